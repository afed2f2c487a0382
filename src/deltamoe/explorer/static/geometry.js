/**
 * What a trace file must be before anything is made of it: every kind, count and shape is what the
 * model's own geometry makes it, as in format.py. Nothing is allocated or looped over on a file's word.
 */

const MOST_TOKENS = 2048;
const MOST_LAYERS = 1000;
const MOST_CHANNELS = 1 << 24;
const MOST_PLACES = 65_535; // experts or heads: a place among them is a u16
const CANDIDATES = { candidate: 20, lens_candidate: 5 };
const DTYPES = { f32: { name: "F32", bytes: 4 }, i32: { name: "I32", bytes: 4 }, u16: { name: "U16", bytes: 2 } };
const EVERY_TRACE = ["tokens.ids", "tokens.surprise", "tokens.ranks", "next.ids", "next.probabilities", "next.entropy"];

const isMapping = (/** @type {any} */ value) => typeof value === "object" && value !== null && !Array.isArray(value);
const isText = (/** @type {any} */ value) => typeof value === "string";
const KINDS = {
  source: isMapping, model: isMapping, tokenizer: isMapping, texts: isMapping, bytes: isMapping, timings: isMapping,
  prompt: isText, text: isText, finish_reason: isText,
  num_tokens: Number.isInteger, num_prompt_tokens: Number.isInteger,
  tokens: Array.isArray, layers: Array.isArray, arrays: Array.isArray, left_out: Array.isArray, checks: Array.isArray,
};

/** A fact about a file that is not so; the message says which. */
export class GeometryError extends Error {}

/** @param {any} holds @param {string} why @returns {asserts holds} */
function must(holds, why) {
  if (!holds) throw new GeometryError(why);
}

/** @param {any} value what a file says @param {number} [most] */
const brief = (value, most = 60) => String(JSON.stringify(value)).slice(0, most);

/** @param {any} section of the configuration @param {string} where @param {Record<string, [number, number]>} bounds least and most by key */
function checkNumbers(section, where, bounds) {
  for (const [key, [least, most]] of Object.entries(bounds)) {
    const value = section[key];
    must(Number.isInteger(value) && value >= least && value <= most, `${where}.${key} is ${brief(value)}, expected a whole number from ${least} to ${most.toLocaleString("en")}`);
  }
}

/** The length of every axis but "layer". @param {any} config @param {number} numTokens @returns {Map<string, number>} */
function sizes(config, numTokens) {
  must(isMapping(config), "it names no model");
  checkNumbers(config, "model", { vocab_size: [1, MOST_CHANNELS], dim: [1, MOST_CHANNELS], mlp_dim: [1, MOST_CHANNELS], num_layers: [1, MOST_LAYERS] });
  const found = new Map([["token", numTokens], ["width", config.dim], ["mlp_channel", config.mlp_dim]]);
  for (const [axis, most] of Object.entries(CANDIDATES)) found.set(axis, Math.min(most, config.vocab_size));
  const { kda, mla, moe } = config;
  for (const [name, section] of Object.entries({ kda, mla, moe })) must(section === null || section === undefined || isMapping(section), `model.${name} is ${brief(section)}`);
  if (kda) {
    const heads = kda.num_value_heads ?? kda.num_heads;
    checkNumbers({ ...kda, num_value_heads: heads }, "model.kda", { num_heads: [1, MOST_PLACES], num_value_heads: [1, MOST_PLACES], key_dim: [1, MOST_CHANNELS], value_dim: [1, MOST_CHANNELS], conv_size: [0, MOST_CHANNELS] });
    must(heads % kda.num_heads === 0, `model.kda.num_value_heads is ${heads}, expected a multiple of ${kda.num_heads}`);
    must(kda.max_beta === 1 || kda.max_beta === 2, `model.kda.max_beta is ${brief(kda.max_beta)}, expected 1 or 2`);
    found.set("head", kda.num_heads).set("value_head", heads).set("key_channel", kda.key_dim).set("value_channel", kda.value_dim);
    found.set("tap", Math.max(kda.conv_size - 1, 0)).set("conv_channel", 2 * kda.num_heads * kda.key_dim + heads * kda.value_dim);
  }
  if (mla) {
    checkNumbers(mla, "model.mla", { num_heads: [1, MOST_PLACES], latent_dim: [1, MOST_CHANNELS], nope_dim: [0, MOST_CHANNELS], rope_dim: [0, MOST_CHANNELS], value_dim: [1, MOST_CHANNELS] });
    const rank = mla.query_rank ?? 0; // without a bottleneck nothing has that axis
    checkNumbers({ query_rank: rank }, "model.mla", { query_rank: [0, MOST_CHANNELS] });
    found.set("mla_value_channel", mla.value_dim).set("query_latent_channel", rank);
    found.set("mla_head", mla.num_heads).set("mla_channel", mla.nope_dim + mla.rope_dim).set("latent_channel", mla.latent_dim);
  }
  if (moe) {
    checkNumbers(moe, "model.moe", { num_experts: [1, MOST_PLACES], num_shared_experts: [0, MOST_PLACES] });
    checkNumbers(moe, "model.moe", { experts_per_token: [1, moe.num_experts] });
    found.set("expert", moe.num_experts).set("choice", moe.experts_per_token);
  }
  return found;
}

/** @param {any} summary */
function checkTokens({ num_tokens: T, num_prompt_tokens: read, tokens, texts }) {
  must(T >= 1 && T <= MOST_TOKENS && T === tokens.length, `it counts ${T} tokens and names ${tokens.length}, expected 1 to 2,048 and all of them named`);
  must(read >= 1 && read <= T, `its prompt has ${read} of ${T} tokens`);
  for (const [i, token] of tokens.entries()) must(isMapping(token) && Number.isInteger(token.id) && isText(token.text) && token.text.length <= 1024, `its token ${i} has no id or no text`);
  must(Object.values(texts).every((text) => isText(text) && text.length <= 1024), "its texts are not all texts");
}

/** @param {any} summary */
function checkLayers({ layers, model: { config } }) {
  must(layers.length === config.num_layers, `it describes ${layers.length} layers of ${config.num_layers}`);
  for (const [i, layer] of layers.entries()) {
    const isKnown = isMapping(layer) && layer.layer === i && ["kda", "mla"].includes(layer.mixer) && ["mlp", "moe"].includes(layer.channel);
    must(isKnown && config[layer.mixer] && (layer.channel === "mlp" || config.moe), `its layer ${i} is ${brief(layer)}, which the model does not have`);
  }
}

/** @param {any} entry @param {any} tensor what the header says of it @param {Map<string, number>} lengths @param {number} numLayers @param {number} space bytes there are */
function checkArray(entry, tensor, lengths, numLayers, space) {
  const where = `the array ${entry.name.slice(0, 60)} is cut short or misdescribed`;
  const { axes, shape, layers } = entry;
  const dtype = Object.hasOwn(DTYPES, entry.dtype) ? DTYPES[/** @type {"f32"} */ (entry.dtype)] : null;
  must(dtype && tensor?.dtype === dtype.name, `${where}: its numbers are ${brief(tensor?.dtype)} and ${brief(entry.dtype)}`);
  const hasLayers = axes[0] === "layer";
  const areLayers = Array.isArray(layers) && layers.every((one, i) => Number.isInteger(one) && one > (i ? layers[i - 1] : -1) && one < numLayers);
  must(hasLayers ? areLayers : layers === null || layers === undefined, `${where}: its layers are ${brief(layers)}`);
  const expected = axes.map((/** @type {string} */ axis, /** @type {number} */ i) => (i === 0 && hasLayers ? layers.length : lengths.get(axis)));
  const isSame = (/** @type {any} */ said) => Array.isArray(said) && said.length === expected.length && said.every((one, i) => Number.isInteger(one) && one >= 0 && one === expected[i]);
  must(isSame(shape) && isSame(tensor.shape), `${where}: its shape is ${brief(shape)}, this model and text make it ${brief(expected)}`);
  const [begin, end] = Array.isArray(tensor.data_offsets) ? tensor.data_offsets : [];
  const size = expected.reduce((/** @type {number} */ a, /** @type {number} */ b) => a * b, 1) * dtype.bytes;
  must(Number.isInteger(begin) && Number.isInteger(end) && begin >= 0 && end - begin === size && end <= space, where);
}

/**
 * @param {any} summary @param {any} header of the file @param {number} space bytes behind the header
 * @throws {GeometryError}
 */
export function checkGeometry(summary, header, space) {
  for (const [key, isRight] of Object.entries(KINDS)) must(isRight(summary[key]), `its ${key} is missing or of the wrong kind`);
  const lengths = sizes(summary.model.config, summary.num_tokens);
  for (const key of ["prefill_tokens_per_s", "read_s"]) must(Number.isFinite(summary.timings[key]), `its timings lack ${key}`);
  checkTokens(summary);
  checkLayers(summary);
  const seen = new Set();
  const isOurs = (/** @type {any} */ entry) => !Array.isArray(entry?.axes) || entry.axes.every((/** @type {any} */ axis) => axis === "layer" || lengths.has(axis));
  summary.arrays = summary.arrays.filter(isOurs); // a later deltamoe may record more, over axes of its own
  for (const entry of summary.arrays) {
    const isEntry = isMapping(entry) && isText(entry.name) && isText(entry.unit) && Array.isArray(entry.axes) && Array.isArray(entry.shape);
    must(isEntry && !seen.has(entry.name), `it lists an array as ${brief(entry)}`);
    seen.add(entry.name);
    checkArray(entry, Object.hasOwn(header, entry.name) ? header[entry.name] : null, lengths, summary.model.config.num_layers, space);
  }
  for (const name of EVERY_TRACE) must(seen.has(name), `the array ${name} is missing`);
  for (const check of summary.checks) must(isMapping(check), "one of its checks is none");
  for (const one of summary.left_out) must(isMapping(one) && Array.isArray(one.arrays) && Array.isArray(one.layers), "what it left out is not described");
}
