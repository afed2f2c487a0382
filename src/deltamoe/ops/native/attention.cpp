// Causal softmax attention within sequences packed along the tokens, forward and backward; see
// ops/attention.
//
// A head's query and key have two parts: one of its own, and one whose keys all heads share. The
// largest score so far is subtracted before exp (flash attention: arXiv 2205.14135, 2307.08691).
// The backward pass keeps the inputs, the outputs and one number a query and head: the log of its
// sum of exponentials. Sums are fp32; the factors of the products too (attention_exact.h), unless
// the tensors are bf16 and the machine has AMX (attention_rounded.h).

#include "attention_exact.h"
#include "attention_rounded.h"

// All parts are fp32 or bf16; log_sums is [tokens, heads].
EXPORT void attention_forward(const Inputs* in, int is_bf16, const Part* out, float* log_sums) {
  const auto forward = !is_bf16        ? forward_exactly<float>
                       : amx_granted() ? forward_rounded
                                       : forward_exactly<bf16>;
  forward(*in, *out, log_sums);
}

// gradients: of q, q_shared, k, k_shared (by heads) and v.
EXPORT void attention_backward(const Inputs* in, int is_bf16, const Part* out,
                               const float* log_sums, const Part* d_out, const Part* gradients) {
  const auto backward = !is_bf16        ? backward_exactly<float>
                        : amx_granted() ? backward_rounded
                                        : backward_exactly<bf16>;
  backward(*in, *out, log_sums, *d_out, gradients[0], gradients[1], gradients[2], gradients[3],
           gradients[4]);
}
