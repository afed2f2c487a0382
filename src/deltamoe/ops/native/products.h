// Matrix products whose operands are rounded to bf16 where that is wanted and faster, one text for
// both ways: what stands left and right of a product is made once, and may be in several.
#pragma once

#include "gemm_bf16.h"

namespace {

// What stands left and right of a product: as it lies in fp32, and packed if it is to be rounded.
struct Left {
  Strided wide;
  const bf16* packed;
  int width;  // terms of a packed row
  Left from(int row, int term = 0) const {
    return {{wide.p + row * wide.row + term * wide.column, wide.row, wide.column},
            packed + row * width + term, width};
  }
};
struct Right {
  const float* wide;
  ptrdiff_t row;
  const bf16* packed;
  int columns;
  Right from(int term) const {  // a multiple of 32 where it is packed
    return {wide + term * row, row, packed + term * columns, columns};
  }
};

int in_tiles(int terms) { return (terms + 31) / 32 * 32; }

// Products in fp32, or in bf16 where that is wanted and faster. What `room` was given to holds its
// packed form as long as it is needed; for fp32 it is null.
struct Products {
  bool rounds;
  bool streams;  // what is kept goes past the caches

  Left left(int M, int K, Strided a, bf16* room) const {
    if (rounds) pack_left(M, K, a, 1.f, room);
    return {a, room, in_tiles(K)};
  }

  Right right(int K, int N, const float* b, bf16* room) const {
    if (rounds) pack_right(N, K, b, N, room);
    return {b, N, room, N};
  }

  // The same, and its rows as a left operand.
  Right right_and_left(int K, int N, const float* b, bf16* room, bf16* rows) const {
    if (rounds) pack_both<false>(N, K, b, room, rows);
    return {b, N, room, N};
  }

  // The same, and the rows are kept for the backward pass, unless they lie there already.
  Right right_and_keep(int K, int N, const float* b, bf16* room, void* rows) const {
    if (!rows) return right(K, N, b, room);
    float* wide = static_cast<float*>(rows);
    bf16* narrow = static_cast<bf16*>(rows);
    if (rounds && streams) pack_both<true>(N, K, b, room, narrow);
    else if (rounds) pack_both<false>(N, K, b, room, narrow);
    else if (streams && wide != b) copy_past_caches(b, int64_t(K) * N, wide);
    else if (wide != b) memcpy(wide, b, sizeof(float) * K * N);
    return {b, N, room, N};
  }

  // The left operand whose rows of K terms were kept, in fp32 `row` apart.
  Left kept(const void* rows, int K, int row) const {
    return {{static_cast<const float*>(rows), row, 1}, static_cast<const bf16*>(rows), in_tiles(K)};
  }

  // [M, K], of rows [K, M].
  Left turned(int M, int K, Left rows, bf16* room) const {
    if (rounds) pack_left_turned(M, K, rows.packed, rows.width, room);
    return {{rows.wide.p, rows.wide.column, rows.wide.row}, room, in_tiles(K)};
  }

  // The right operand [K, N], of rows [N, K].
  Right turned(int K, int N, Left rows, float* wide, bf16* room) const {
    if (rounds) pack_turned(N, K, rows.packed, room);
    else transpose(N, K, rows.wide.p, rows.wide.row, wide, N);
    return {wide, N, room, N};
  }

  // A B in blocks that are worked on while they are near (gemm_packed_blocks); `c` is room for it.
  template <class Finish>
  void in_blocks(int M, int N, int K, Left a, Right b, float* c, Finish finish) const {
    if (rounds)
      return gemm_packed_blocks(M, N, in_tiles(K), a.packed, a.width, b.packed, b.columns, finish);
    gemm<Into::SET>(M, N, K, a.wide, b.wide, b.row, c, N);
    finish(0, 0, M, N, c, N);
  }

  template <Into into>
  void run(int M, int N, int K, Left a, Right b, float* c, ptrdiff_t ldc,
           const float* scale = nullptr) const {
    static_assert(into != Into::SUB, "tiles only add");
    if (!rounds) return gemm<into>(M, N, K, a.wide, b.wide, b.row, c, ldc, scale);
    gemm_packed<into != Into::SET>(M, N, in_tiles(K), a.packed, a.width, b.packed, b.columns, c,
                                   ldc, scale);
  }
};

}  // namespace
