/** All views, in the order of the tabs; one file for each concept. */

import { ablate } from "./ablate.js";
import { attention } from "./attention.js";
import { chat } from "./chat.js";
import { decay } from "./decay.js";
import { exporting } from "./export.js";
import { expertsTokens } from "./experts_tokens.js";
import { layersExperts } from "./layers_experts.js";
import { memory } from "./memory.js";
import { next } from "./next.js";
import { runs } from "./runs.js";
import { sparse } from "./sparse.js";
import { state } from "./state.js";

/** @type {import("../panel.js").View[][]} */
export const VIEWS = [[sparse, expertsTokens, layersExperts], [decay, memory, attention, state], [next, ablate], [chat, runs, exporting]];
