/** Screen 5: cases side by side, the front no other beats, and export. */

import { useSignal } from "@preact/signals";
import * as Plot from "@observablehq/plot";
import { type Candidate, type Predict, call, machines, refusal } from "./api";
import { Chart, Table } from "./chart";
import { bytes, seconds, shown, whole } from "./format";
import { type Case, caseOf, current, isCase, parse, print, set, view } from "./state";
import { quality } from "./verdict";
import { Command, Empty, Num } from "./why";

/** Put the current case into the comparison. */
export function addToCompare(): void {
  if (!isCase(current.value)) return;
  const { screen: _s, compare: _c, selected: _x, brush: _b, ...rest } = view.value;
  const text = print({ ...view.value, ...rest, screen: "verdict", compare: [], selected: "", brush: [], search: "", paper: "" }).slice(1);
  if (!view.value.compare.includes(text)) set({ compare: [...view.value.compare, text] });
}

interface Row {
  key: string;
  asked: Case | null;
  found: Predict | null;
  error: string;
}

/** Answers by case, kept while the page is open. */
const answers = new Map<string, Predict>();

const COSTS: Record<string, { label: string; unit: string; of: (p: Predict) => number | null }> = {
  usd_per_million_tokens: { label: "USD per million tokens", unit: "USD/Mtoken", of: (p) => p.report.figures["usd_per_million_tokens"]?.value ?? null },
  energy_j_per_token: { label: "energy per token", unit: "J/token", of: (p) => p.report.figures["energy_j_per_token"]?.value ?? null },
  peak_bytes: { label: "peak memory", unit: "B", of: (p) => p.report.counts["peak_bytes"] ?? null },
};

/** A figure of a row, and where it comes from. */
function Of({ found, name, label, unit }: { found: Predict | null; name: string; label: string; unit?: string }) {
  const figure = found?.report.figures[name];
  if (!found || !figure) return null;
  const band = figure.p10 !== null && figure.p90 !== null ? `P10 ${figure.p10.toPrecision(4)}, P90 ${figure.p90.toPrecision(4)} ${figure.unit} (${figure.kind})\n` : "";
  return <Num title={label} text={`${name} = ${figure.value} ${figure.unit}\n${band}${figure.why}\nCheck: ${figure.check}\n${found.command} --explain ${name}`}>{shown(figure.value, unit ?? figure.unit)}</Num>;
}

const letter = (index: number): string => (index < 26 ? String.fromCharCode(65 + index) : `${letter(Math.floor(index / 26) - 1)}${letter(index % 26)}`);

const value = (p: Predict, name: string) => p.report.figures[name]?.value ?? null;

/** Rows that another one beats in both directions, or that do not fit. */
export function dominated(rows: { key: string; x: number | null; y: number | null; fits: boolean }[]): Set<string> {
  const out = new Set<string>();
  for (const a of rows) {
    const beaten = rows.some((b) => b !== a && b.fits && a.x !== null && a.y !== null && b.x !== null && b.y !== null
      && b.x <= a.x && b.y <= a.y && (b.x < a.x || b.y < a.y));
    if (!a.fits || beaten) out.add(a.key);
  }
  return out;
}

export function CompareScreen() {
  const version = useSignal(0);
  const errors = useSignal<Record<string, string>>({});
  const rows: Row[] = view.value.compare.map((key) => {
    const asked = caseOf(parse(key));
    const text = JSON.stringify(asked);
    void version.value;
    if (isCase(asked) && !answers.has(text) && errors.value[text] === undefined) {
      errors.value[text] = ""; // asked for
      call("post", "/api/predict", asked).then(
        (found) => answers.set(text, found),
        (error) => (errors.value = { ...errors.value, [text]: refusal(error).message }),
      ).finally(() => version.value++);
    }
    return { key, asked: isCase(asked) ? asked : null, found: answers.get(text) ?? null, error: isCase(asked) ? (errors.value[text] ?? "") : asked.message };
  });
  const cost = COSTS[view.value.cost] ?? COSTS["usd_per_million_tokens"];
  if (!cost) return null;
  const done = rows.flatMap((row) => (row.found && row.asked ? [{ ...row, found: row.found, asked: row.asked }] : []));
  const placed = done.map((row) => ({ key: row.key, x: cost.of(row.found), y: value(row.found, "tpot_s"), fits: row.found.fits, letter: letter(rows.findIndex((r) => r.key === row.key)), name: nameOf(row.asked), quality: qualityOf(row.asked) }));
  const lost = dominated(placed);
  const drawn = placed.filter((p) => p.x !== null && p.y !== null);
  const unpriced = placed.length - drawn.length;
  return (
    <>
      <h1>Plans side by side</h1>
      <div class="row">
        <button type="button" onClick={addToCompare}>Add the current case (c)</button>
        <AddMachines />
        <div class="field">
          <label for="f-cost">Cost on the chart</label>
          <select id="f-cost" onChange={(e) => set({ cost: e.currentTarget.value })}>
            {Object.entries(COSTS).map(([name, c]) => <option key={name} value={name} selected={name === view.value.cost}>{c.label}</option>)}
          </select>
        </div>
      </div>
      {rows.length === 0 && <Empty command="trimtab plan llama-3.1-8b --on a100 --on h100">Nothing to compare yet. Add the current case, change machine or techniques above, and add again.</Empty>}
      {rows.length > 0 && (
        <>
          <Table caption="Compared cases; grey: beaten in cost and TPOT, or does not fit" rows={rows} rowKey={(r) => r.key} dim={(r) => lost.has(r.key)} columns={[
            { title: "", cell: (r) => <b>{letter(rows.indexOf(r))}</b> },
            { title: "case", cell: (r) => <a href={`#${r.key}`} onClick={(e) => { e.preventDefault(); set({ ...parse(r.key), compare: view.value.compare }); }}>{r.asked ? nameOf(r.asked) : r.key}</a> },
            { title: "memory", number: true, cell: (r) => (r.found ? `${bytes(r.found.report.counts["peak_bytes"] ?? 0)}${r.found.fits ? "" : ", does not fit"}` : r.error || "pricing") },
            { title: "TTFT", number: true, cell: (r) => <Of found={r.found} name="ttft_s" label="TTFT" /> },
            { title: "TPOT", number: true, cell: (r) => <Of found={r.found} name="tpot_s" label="TPOT" /> },
            { title: "tokens/s", number: true, cell: (r) => <Of found={r.found} name="tokens_per_s" label="tokens per second" unit=" " /> },
            { title: "J/token", number: true, cell: (r) => <Of found={r.found} name="energy_j_per_token" label="energy per token" unit="" /> },
            { title: "$/Mtoken", number: true, cell: (r) => <Of found={r.found} name="usd_per_million_tokens" label="price of a million tokens" /> },
            { title: "quality", cell: (r) => (r.asked ? qualityOf(r.asked) : "") },
            { title: "", cell: (r) => <button type="button" aria-label={`Take out ${r.asked ? nameOf(r.asked) : r.key}`} onClick={() => set({ compare: view.value.compare.filter((k) => k !== r.key) })}>×</button> },
          ]} />
          {unpriced > 0 && <p>{unpriced} not drawn, for their {cost.label} is unknown: give a price per hour above, or choose another cost.</p>}
          {drawn.length > 0 && (
            <Chart title={`TPOT against ${cost.label}; the line joins cases that no other beats`} on={[drawn, cost.label]} options={() => ({
              inset: 24,
              x: { type: "log", label: `${cost.label} →`, grid: true, tickFormat: (v: number) => shown(v, cost.unit), ticks: 5 },
              y: { type: "log", label: "↑ TPOT", tickFormat: seconds, grid: true, ticks: 5 },
              marks: [
                Plot.line(drawn.filter((p) => !lost.has(p.key)).sort((a, b) => (a.x ?? 0) - (b.x ?? 0)), { x: "x", y: "y", stroke: "var(--accent)", curve: "step-after" }),
                Plot.dot(drawn, { x: "x", y: "y", r: 9, sort: null, fill: (p) => (p.quality.startsWith("KL") || p.quality === "unchanged" ? "var(--accent)" : "none"), stroke: (p) => (lost.has(p.key) ? "var(--dim)" : "var(--accent)"), strokeWidth: 2, className: "plan", ariaLabel: "name" }),
                Plot.text(drawn, { x: "x", y: "y", text: "letter", dy: -18, fontSize: 13, fontWeight: "bold", fill: (p) => (lost.has(p.key) ? "var(--dim)" : "currentColor") }),
              ],
            })}>
              <Table caption="The front" rows={drawn} columns={[
                { title: "", cell: (p) => p.letter },
                { title: "case", cell: (p) => p.name },
                { title: cost.label, number: true, cell: (p) => shown(p.x, cost.unit) },
                { title: "TPOT", number: true, cell: (p) => shown(p.y, "s") },
                { title: "beaten", cell: (p) => (lost.has(p.key) ? "yes" : "no") },
              ]} />
              <p>Filled: quality is unchanged or was measured here. Hollow: nobody measured it here.</p>
            </Chart>
          )}
          <Export rows={done} />
        </>
      )}
      <Search />
    </>
  );
}

const nameOf = (c: Case): string =>
  [c.model.split("/").at(-1), "on", c.machine ?? "default", c.tp * c.pp > 1 ? `tp${c.tp} pp${c.pp}` : "", `b${c.batch}`, `${c.prompt}+${c.gen}`, c.dtype === "bfloat16" ? "" : c.dtype, ...c.techniques].filter(Boolean).join(" ");

const qualityOf = (c: Case): string => (c.techniques.length === 0 ? "unchanged" : c.techniques.map(quality).filter(Boolean).join("; ") || "not measured");

/** The current case on several machines at once. */
function AddMachines() {
  machines.once();
  const all = () => {
    const before = view.value;
    for (const name of ["a100", "h100", "h200", "l40s", "4090", "mi300x"]) {
      if (!machines.found.value.value?.machines.some((m) => m.id === name || m.aliases.includes(name))) continue;
      view.value = { ...view.value, machine: name };
      addToCompare();
    }
    set({ machine: before.machine });
  };
  return <button type="button" onClick={all}>Add it on six machines</button>;
}

function Export({ rows }: { rows: { asked: Case; found: Predict }[] }) {
  const names = ["ttft_s", "tpot_s", "tokens_per_s", "energy_j_per_token", "usd_per_million_tokens"];
  const flat = () => rows.map(({ asked, found }) => ({
    ...asked, techniques: asked.techniques.join("+"), machine: String(found.report.plan["machine"]), stack: String(found.report.plan["stack"]),
    peak_bytes: found.report.counts["peak_bytes"], fits: found.fits, ...Object.fromEntries(names.map((n) => [n, value(found, n)])), command: found.command,
  }));
  const save = (name: string, kind: string, text: string) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: kind }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };
  const csv = () => {
    const table = flat();
    const columns = Object.keys(table[0] ?? {});
    const cell = (v: unknown) => (/[",\n]/.test(String(v ?? "")) ? `"${String(v).replaceAll('"', '""')}"` : String(v ?? ""));
    return [columns.join(","), ...table.map((row) => columns.map((c) => cell((row as Record<string, unknown>)[c])).join(","))].join("\n");
  };
  return (
    <section aria-labelledby="export">
      <h2 id="export">Export</h2>
      <p>
        <button type="button" onClick={() => save("trimtab-plans.csv", "text/csv", csv())}>CSV</button>{" "}
        <button type="button" onClick={() => save("trimtab-plans.json", "application/json", JSON.stringify(flat(), null, 2))}>JSON</button>{" "}
        {whole(rows.length)} cases
      </p>
      {rows.map(({ found }, index) => <Command key={index} text={found.command} />)}
    </section>
  );
}

/** `trimtab plan`: all layouts, formats and techniques under limits. */
function Search() {
  const machinesAsked = useSignal("a100 h100 h200 l40s");
  const limits = useSignal<Record<string, string>>({});
  const found = useSignal<{ best: Candidate[]; lost: Candidate[]; evaluated: number } | null>(null);
  const error = useSignal("");
  const busy = useSignal(false);
  const go = async () => {
    const c = current.value;
    if (!isCase(c)) return;
    const bad = Object.entries(limits.value).find(([, text]) => text.trim() && !(Number(text) > 0));
    if (bad) return void (error.value = `${bad[1]} is no limit. Allowed: a number above 0; empty for none.`);
    const limit = (name: string, scale = 1) => (limits.value[name]?.trim() ? Number(limits.value[name]) / scale : null);
    busy.value = true;
    error.value = "";
    try {
      found.value = await call("post", "/api/search", {
        model: c.model, machines: machinesAsked.value.split(/[\s,]+/).filter(Boolean), prompt: c.prompt, gen: c.gen, counts: [1, 2, 4, 8], concurrency: 256,
        dtypes: ["bfloat16", "fp8"], kv_dtypes: ["bfloat16", "fp8"], techniques: c.techniques.length ? [c.techniques.join("+")] : [],
        ttft_s: limit("ttft", 1e3), tpot_s: limit("tpot", 1e3), usd_per_h: limit("usd_per_h"), usd_per_million_tokens: limit("usd"),
      });
    } catch (caught) {
      error.value = refusal(caught).message;
    } finally {
      busy.value = false;
    }
  };
  const open = (p: Candidate) => {
    const before = view.value;
    view.value = { ...before, machine: p.machine, stack: p.stack, dtype: p.dtype, kv: p.kv_dtype, tp: String(p.tp), pp: String(p.pp), batch: String(p.concurrency), serving: true, techniques: p.techniques };
    addToCompare();
    view.value = { ...before, compare: view.value.compare };
  };
  const field = (name: string, label: string) => (
    <div class="field">
      <label for={`l-${name}`}>{label}</label>
      <input id={`l-${name}`} size={7} inputMode="decimal" placeholder="none" value={limits.value[name] ?? ""} onInput={(e) => (limits.value = { ...limits.value, [name]: e.currentTarget.value })} />
    </div>
  );
  return (
    <section aria-labelledby="search">
      <h2 id="search">Search for plans</h2>
      <form class="row" onSubmit={(e) => { e.preventDefault(); void go(); }}>
        <div class="field">
          <label for="l-machines">Machines</label>
          <input id="l-machines" size={24} value={machinesAsked.value} onInput={(e) => (machinesAsked.value = e.currentTarget.value)} />
        </div>
        {field("ttft", "TTFT limit, ms")}
        {field("tpot", "TPOT limit, ms")}
        {field("usd_per_h", "USD per hour")}
        {field("usd", "USD per Mtoken")}
        <button type="submit" disabled={busy.value}>Search</button>
      </form>
      {error.value && <p class="error" role="alert">{error.value}</p>}
      {busy.value && <p class="busy">Pricing every layout and format; this takes seconds.</p>}
      {found.value && found.value.best.length === 0 && <Empty command={`trimtab plan ${view.value.model}`}>No plan keeps the limits. {found.value.lost[0] && `Nearest: ${found.value.lost[0].machine}: ${found.value.lost[0].lost}`}</Empty>}
      {found.value && found.value.best.length > 0 && <Table caption={`${found.value.evaluated} plans priced; those that no other beats`} rows={found.value.best} columns={[
        { title: "plan", cell: (p) => `${p.tp * p.pp} x ${p.machine} tp${p.tp} pp${p.pp}, ${p.dtype}, cache ${p.kv_dtype} ${p.techniques.join(" ")}` },
        { title: "requests", number: true, cell: (p) => p.concurrency },
        { title: "TTFT", number: true, cell: (p) => shown(p.figures["ttft_s"], "s") },
        { title: "TPOT", number: true, cell: (p) => shown(p.figures["tpot_s"], "s") },
        { title: "$/Mtoken", number: true, cell: (p) => shown(p.figures["usd_per_million_tokens"], "USD/Mtoken") },
        { title: "", cell: (p) => <button type="button" onClick={() => open(p)}>Compare</button> },
      ]} />}
    </section>
  );
}
