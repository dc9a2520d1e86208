/** The page: bar, tabs, one screen, keys. */

import { signal } from "@preact/signals";
import { render } from "preact";
import { prediction } from "./api";
import { Bar } from "./bar";
import { CompareScreen, addToCompare } from "./compare";
import { MeasuredScreen, runIds } from "./measured";
import { Operators, rowNames } from "./operators";
import { SCREENS, type Screen, set, view } from "./state";
import { SweepScreen } from "./sweep";
import { TechniqueScreen, entryIds } from "./techniques";
import { Verdict } from "./verdict";
import { WhyPanel, closeWhy } from "./why";
import "./style.css";

const TITLES: Record<Screen, string> = {
  verdict: "Verdict", operators: "Operators", sweep: "Batch and context", techniques: "Techniques", compare: "Compare", measured: "Measured",
};
const VIEWS: Record<Screen, () => preact.ComponentChild> = {
  verdict: Verdict, operators: Operators, sweep: SweepScreen, techniques: TechniqueScreen, compare: CompareScreen, measured: MeasuredScreen,
};

const KEYS: [string, string][] = [
  ["1 to 6", "go to a screen"],
  ["/", "search, or the model's name where nothing is searched"],
  ["j, k", "next and previous row"],
  ["Enter", "press what has the focus"],
  ["c", "add the current case to the comparison"],
  ["Esc", "close, leave a field"],
  ["?", "this help"],
];

const help = signal(false);
const said = signal("");

/** The rows of the screen and what choosing one changes. */
function step(by: number): void {
  const { screen, selected, paper } = view.value;
  const lists: Partial<Record<Screen, [string[], string, (id: string) => void]>> = {
    operators: [rowNames.value, selected, (id) => set({ selected: id })],
    techniques: [entryIds.value, paper, (id) => set({ paper: id })],
    measured: [runIds.value, selected, (id) => set({ selected: id })],
  };
  const [rows, now, choose] = lists[screen] ?? [[], "", () => undefined];
  if (rows.length === 0) return;
  const at = rows.indexOf(now);
  const next = rows[at < 0 ? (by > 0 ? 0 : rows.length - 1) : Math.min(Math.max(at + by, 0), rows.length - 1)];
  if (next === undefined) return;
  choose(next);
  requestAnimationFrame(() => document.querySelector(`tr[data-row="${CSS.escape(next)}"]`)?.scrollIntoView({ block: "nearest" }));
}

addEventListener("keydown", (event) => {
  const target = event.target as HTMLElement;
  const typing = target.matches("input:not([type=checkbox]):not([type=radio]):not([type=range]), select, textarea");
  if (event.key === "Escape") {
    if (closeWhy()) return;
    if (help.value) help.value = false;
    else if (typing) target.blur();
    return;
  }
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const screen = SCREENS[Number(event.key) - 1];
  if (screen) set({ screen });
  else if (event.key === "/") {
    event.preventDefault();
    const field = document.querySelector<HTMLInputElement>("#f-search") ?? document.querySelector<HTMLInputElement>("#f-model");
    field?.focus();
    field?.select();
  } else if (event.key === "j" || event.key === "k") step(event.key === "j" ? 1 : -1);
  else if (event.key === "c") {
    addToCompare();
    said.value = `In the comparison: ${view.value.compare.length}`;
  } else if (event.key === "?") help.value = !help.value;
});

function App() {
  const now = view.value.screen;
  const Shown = VIEWS[now];
  document.title = `${TITLES[now]}: ${view.value.model} - Trimtab explorer`;
  return (
    <>
      <a class="skip" href="#main" onClick={(e) => { e.preventDefault(); document.querySelector<HTMLElement>("main")?.focus(); }}>To the numbers</a>
      <header class="top">
        <b>Trimtab</b>
        <nav aria-label="Screens">
          {SCREENS.map((screen) => (
            <a key={screen} href={`#s=${screen}`} aria-current={screen === now ? "page" : undefined} onClick={(e) => { e.preventDefault(); set({ screen }); }}>
              {TITLES[screen]}{screen === "compare" && view.value.compare.length ? ` (${view.value.compare.length})` : ""}
            </a>
          ))}
        </nav>
        <span role="status" class="said">{said.value}</span>
        <button type="button" onClick={() => (help.value = !help.value)} aria-expanded={help.value}>Keys (?)</button>
      </header>
      <Bar />
      <main id="main" tabIndex={-1} aria-busy={prediction.found.value.busy}><Shown key={now} /></main>
      <WhyPanel />
      {help.value && (
        <div class="why" role="dialog" aria-label="Keys">
          <header><h2>Keys</h2><button type="button" onClick={() => (help.value = false)}>Close</button></header>
          <dl class="keys">{KEYS.map(([k, what]) => <div key={k}><dt><kbd>{k}</kbd></dt><dd>{what}</dd></div>)}</dl>
        </div>
      )}
    </>
  );
}

const place = document.getElementById("app");
if (place) {
  place.replaceChildren();
  render(<App />, place);
}
