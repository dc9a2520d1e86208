/** What is looked at: one value that the address holds, so that a link or a reload brings it back. */

import { computed, effect, signal } from "@preact/signals";

export const SCREENS = ["verdict", "operators", "sweep", "techniques", "compare", "measured"] as const;
export type Screen = (typeof SCREENS)[number];

/** Numbers stay the text that was typed: what is wrong is said beside the field and nothing is lost. */
export interface View {
  screen: Screen;
  model: string;
  machine: string;
  stack: string;
  batch: string;
  prompt: string;
  gen: string;
  serving: boolean;
  tp: string;
  pp: string;
  dtype: string;
  kv: string;
  price: string;
  techniques: string[];
  phase: string;
  selected: string;
  brush: string[];
  per: "all" | "call";
  sort: string;
  ttft: string;
  tpot: string;
  search: string;
  paper: string;
  compare: string[];
  cost: string;
  viewer: boolean;
}

const START: View = {
  screen: "verdict", model: "llama-3.1-8b", machine: "", stack: "", batch: "1", prompt: "2048", gen: "128", serving: false,
  tp: "1", pp: "1", dtype: "bfloat16", kv: "bfloat16", price: "", techniques: [], phase: "decode", selected: "", brush: [], per: "all",
  sort: "-time_s", ttft: "", tpot: "", search: "", paper: "", compare: [], cost: "usd_per_million_tokens", viewer: false,
};

/** Keys of the address; short, since links are passed around. */
const KEYS: Record<keyof View, string> = {
  screen: "s", model: "m", machine: "on", stack: "st", batch: "b", prompt: "p", gen: "g", serving: "srv", tp: "tp", pp: "pp",
  dtype: "dt", kv: "kv", price: "usd", techniques: "t", phase: "ph", selected: "sel", brush: "br", per: "per", sort: "o", ttft: "ttft",
  tpot: "tpot", search: "q", paper: "n", compare: "c", cost: "x", viewer: "lv",
};

const NAMES = Object.keys(KEYS) as (keyof View)[];

export function parse(hash: string): View {
  const given = new URLSearchParams(hash.replace(/^#/, ""));
  const found: Record<string, unknown> = { ...START };
  for (const name of NAMES) {
    const key = KEYS[name];
    if (!given.has(key)) continue;
    const first = START[name];
    found[name] = Array.isArray(first) ? given.getAll(key) : typeof first === "boolean" ? given.get(key) === "1" : given.get(key);
  }
  const view = found as unknown as View;
  return SCREENS.includes(view.screen) ? view : { ...view, screen: "verdict" };
}

export function print(view: View): string {
  const parts = new URLSearchParams();
  for (const name of NAMES) {
    const value = view[name];
    if (Array.isArray(value)) for (const each of value) parts.append(KEYS[name], each);
    else if (name === "screen" || value !== START[name]) parts.set(KEYS[name], value === true ? "1" : String(value || ""));
  }
  return `#${parts.toString()}`;
}

export const view = signal<View>(parse(location.hash));

/** Change what is looked at. Another screen is a step that "back" undoes; a moved slider is not. */
export function set(change: Partial<View>): void {
  const next = { ...view.value, ...change };
  if (change.screen && change.screen !== view.value.screen) history.pushState(null, "", print(next));
  view.value = next;
}

effect(() => {
  const hash = print(view.value);
  if (hash !== location.hash) history.replaceState(null, "", hash);
});
for (const event of ["hashchange", "popstate"]) addEventListener(event, () => (view.value = parse(location.hash)));

/** The fields that decide a prediction. */
export interface Case {
  model: string;
  machine: string | null;
  stack: string | null;
  batch: number;
  prompt: number;
  gen: number;
  continuous: boolean;
  techniques: string[];
  dtype: string;
  kv_dtype: string;
  tp: number;
  pp: number;
  usd_per_h: number | null;
}

export interface Refusal {
  param: string;
  message: string;
}

const COUNTED = ["batch", "prompt", "gen", "tp", "pp"] as const;

/** The case of a view, or the first field that holds no number. */
export function caseOf(v: View): Case | Refusal {
  for (const name of COUNTED) {
    if (!/^\d{1,15}$/.test(v[name].trim()))
      return { param: name, message: `${name}=${v[name] || "(empty)"} is not possible. Allowed: a whole number of 1 or more.` };
  }
  if (v.price.trim() && !(Number(v.price) >= 0))
    return { param: "usd_per_h", message: `${v.price} is not a price. Allowed: US dollars per hour, 0 or more; empty for the catalogue's.` };
  return {
    model: v.model, machine: v.machine || null, stack: v.stack || null, batch: +v.batch, prompt: +v.prompt, gen: +v.gen,
    continuous: v.serving, techniques: v.techniques, dtype: v.dtype, kv_dtype: v.kv, tp: +v.tp, pp: +v.pp,
    usd_per_h: v.price.trim() ? Number(v.price) : null,
  };
}

/** Changes only when the case does: moving through tables asks the server nothing. */
const text = computed(() => JSON.stringify(caseOf(view.value)));
export const current = computed(() => JSON.parse(text.value) as Case | Refusal);
export const isCase = (found: Case | Refusal): found is Case => "model" in found;
