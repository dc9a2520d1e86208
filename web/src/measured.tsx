/** Screen 6: what was measured on this machine against what was predicted before. */

import { computed } from "@preact/signals";
import * as Plot from "@observablehq/plot";
import { type Run, runs } from "./api";
import { Chart, Table, points } from "./chart";
import { percent, shown } from "./format";
import { MeasureButton, ProgressPanel, join } from "./measure";
import { set, view } from "./state";
import { Empty, Num } from "./why";

/** Runs that match what is searched, newest first. */
const shownRuns = computed(() => {
  const words = view.value.search.toLowerCase().split(/\s+/).filter(Boolean);
  return (runs.found.value.value?.runs ?? []).filter((run) => {
    const text = [run.id, run.model, run.machine, run.state, run.version, ...run.techniques].join(" ").toLowerCase();
    return words.every((word) => text.includes(word));
  });
});

export const runIds = computed(() => shownRuns.value.map((run) => String(run.id)));

const of = (run: Run, name: string) => run.pairs.find((pair) => pair.name === name);
const TIMES = [["ttft_s", "TTFT"], ["tpot_s", "TPOT"]] as const;

export function MeasuredScreen() {
  runs.once();
  join();
  const { error, busy, value } = runs.found.value;
  const rows = shownRuns.value;
  const open = rows.find((run) => String(run.id) === view.value.selected);
  const dots = rows.flatMap((run) => TIMES.flatMap(([name, label]) => {
    const pair = of(run, name);
    return pair ? [{ run, label, ...pair, ratio: pair.measured / pair.predicted }] : [];
  }));
  const ends = dots.length ? [Math.min(...dots.flatMap((d) => [d.predicted, d.measured])) / 1.5, Math.max(...dots.flatMap((d) => [d.predicted, d.measured])) * 1.5] : [1, 10];
  const diagonal = [1, 0.8, 1.2].map((factor) => ({ factor, x1: ends[0] ?? 1, x2: ends[1] ?? 10 }));
  return (
    <>
      <h1>Measured against predicted</h1>
      {error && <p class="error" role="alert">{error.message}</p>}
      <ProgressPanel />
      <MeasureButton />
      {value?.runs.length === 0 && <Empty command="trimtab measure smollm2-135m -t rtn:bits=4">Nothing was measured on this machine yet.</Empty>}
      {!value && busy && <p class="busy">Reading the ledger.</p>}
      {value && value.runs.length > 0 && (
        <>
          <div class="field">
            <label for="f-search">Search runs (/)</label>
            <input id="f-search" type="search" size={28} value={view.value.search} onInput={(e) => set({ search: e.currentTarget.value })} />
          </div>
          {dots.length > 0 && (
            <Chart title="Seconds, measured over predicted; the line is y = x, the thin lines 20 % off" height={400} on={[dots, view.value.selected]} options={() => ({
              x: { type: "log", label: "predicted →", tickFormat: (v: number) => shown(v, "s"), ticks: 5, domain: ends },
              y: { type: "log", label: "↑ measured", tickFormat: (v: number) => shown(v, "s"), ticks: 5, grid: true },
              color: { domain: ["TTFT", "TPOT"], range: ["var(--compute)", "var(--memory)"], legend: true },
              marks: [
                Plot.link(diagonal, { x1: "x1", x2: "x2", y1: (d) => d.x1 * d.factor, y2: (d) => d.x2 * d.factor, stroke: "currentColor", strokeWidth: (d) => (d.factor === 1 ? 1.5 : 0.7), strokeOpacity: 0.6 }),
                Plot.ruleX(dots, { x: "predicted", y1: (d) => d.low ?? d.measured, y2: (d) => d.high ?? d.measured, stroke: "label" }),
                Plot.ruleY(dots, { y: "measured", x1: (d) => d.p10 ?? d.predicted, x2: (d) => d.p90 ?? d.predicted, stroke: "label", strokeOpacity: 0.5 }),
                Plot.dot(dots, { x: "predicted", y: "measured", fill: "label", stroke: (d) => (String(d.run.id) === view.value.selected ? "currentColor" : "none"), strokeWidth: 3, r: 5, sort: null, className: "run", ariaLabel: (d) => `run ${d.run.id} ${d.label}: ${percent(d.ratio)} of predicted` }),
              ],
            })} ready={(plot) => {
              for (const { index, element } of points(plot, "run")) element.addEventListener("click", () => set({ selected: String(dots[index]?.run.id ?? "") }));
            }}>
              <Table caption="Measured over predicted" rows={dots} columns={[
                { title: "run", number: true, cell: (d) => d.run.id },
                { title: "figure", cell: (d) => d.label },
                { title: "predicted", number: true, cell: (d) => shown(d.predicted, "s") },
                { title: "measured", number: true, cell: (d) => shown(d.measured, "s") },
                { title: "measured / predicted", number: true, cell: (d) => d.ratio.toFixed(3) },
              ]} />
            </Chart>
          )}
          {dots.length > 1 && <Drift dots={dots} />}
          <Table caption="Runs, newest first" rows={rows} rowKey={(run) => String(run.id)} selected={view.value.selected} columns={[
            { title: "run", number: true, cell: (run) => <button type="button" class="num" aria-label={`Open run ${run.id}`} onClick={() => set({ selected: String(run.id) === view.value.selected ? "" : String(run.id) })}>{run.id}</button> },
            { title: "started (UTC)", cell: (run) => run.started_utc.replace("T", " ").replace("+00:00", "") },
            { title: "state", cell: (run) => run.state },
            { title: "version", cell: (run) => run.version },
            { title: "model", cell: (run) => run.model },
            { title: "techniques", cell: (run) => run.techniques.join(" + ") || "none" },
            { title: "batch x prompt + gen", cell: (run) => `${run.batch} x ${run.prompt}+${run.gen}` },
            ...TIMES.map(([name, label]) => ({
              title: `${label} measured (predicted)`, number: true,
              cell: (run: Run) => {
                const pair = of(run, name);
                return pair ? <Num title={`${label} of run ${run.id}`} text={`measured ${pair.measured} s (rounds ${pair.low} to ${pair.high}), predicted before ${pair.predicted} s (P10 ${pair.p10}, P90 ${pair.p90})\nmeasured / predicted = ${(pair.measured / pair.predicted).toFixed(3)}\nSource: run ${run.id} of the ledger, Trimtab ${run.version}\nCheck: trimtab measure --list`}>{shown(pair.measured, "s")} ({shown(pair.predicted, "s")})</Num> : "none";
              },
            })),
            { title: "KL", number: true, cell: (run) => run.quality["kl_nats"]?.toPrecision(2) ?? "" },
            { title: "perplexity", number: true, cell: (run) => run.quality["ppl"]?.toFixed(2) ?? "" },
          ]} />
          {open && <Details run={open} />}
        </>
      )}
    </>
  );
}

interface Dot {
  run: Run;
  label: string;
  ratio: number;
}

/** Measured over predicted, run after run: whether predictions get better or worse from version to version. */
function Drift({ dots }: { dots: Dot[] }) {
  const versions = dots.filter((d, i) => d.run.version !== dots[i + 1]?.run.version); // newest first: the last of each is its first run
  return (
    <Chart title="Measured over predicted, run after run, with the first run of each version named" height={240} on={[dots]} options={() => ({
      x: { label: "run →", tickFormat: (v: number) => (Number.isInteger(v) ? String(v) : ""), inset: 20 },
      y: { type: "log", label: "↑ measured / predicted", tickFormat: (v: number) => v.toFixed(2), ticks: 5, grid: true },
      color: { domain: ["TTFT", "TPOT"], range: ["var(--compute)", "var(--memory)"], legend: true },
      marks: [
        Plot.ruleY([1], { stroke: "currentColor" }),
        Plot.ruleY([0.8, 1.2], { stroke: "currentColor", strokeOpacity: 0.5, strokeDasharray: "4 4" }),
        Plot.text(versions, { x: (d) => d.run.id, frameAnchor: "top", text: (d) => d.run.version, dy: 4, fill: "currentColor" }),
        Plot.dot(dots, { x: (d) => d.run.id, y: "ratio", fill: "label", r: 4, className: "drift" }),
      ],
    })}>
      <Table caption="Measured over predicted by version" rows={byVersion(dots)} columns={[
        { title: "version", cell: (r) => r.version },
        { title: "figure", cell: (r) => r.label },
        { title: "runs", number: true, cell: (r) => r.ratios.length },
        { title: "median", number: true, cell: (r) => r.ratios[r.ratios.length >> 1]?.toFixed(3) },
        { title: "worst", number: true, cell: (r) => [...r.ratios].sort((a, b) => Math.abs(Math.log(b)) - Math.abs(Math.log(a)))[0]?.toFixed(3) },
      ]} />
    </Chart>
  );
}

function byVersion(dots: Dot[]): { version: string; label: string; ratios: number[] }[] {
  const found = new Map<string, { version: string; label: string; ratios: number[] }>();
  for (const { run, label, ratio } of dots) {
    const key = `${run.version} ${label}`;
    const row = found.get(key) ?? { version: run.version, label, ratios: [] };
    row.ratios.push(ratio);
    row.ratios.sort((a, b) => a - b);
    found.set(key, row);
  }
  return [...found.values()];
}

function Details({ run }: { run: Run }) {
  return (
    <section aria-labelledby="run">
      <h2 id="run">Run {run.id}: {run.model} {run.techniques.join(" + ")}</h2>
      {run.error && <p class="error">{run.error}</p>}
      {run.pairs.length === 0 && <p>It holds no measurement: {run.state}.</p>}
      {run.pairs.length > 0 && <Table caption={`Every quantity of run ${run.id}`} rows={run.pairs} columns={[
        { title: "quantity", cell: (p) => p.name },
        { title: "predicted", number: true, cell: (p) => shown(p.predicted, p.unit) },
        { title: "measured", number: true, cell: (p) => shown(p.measured, p.unit) },
        { title: "verdict", cell: (p) => (p.exact ? (p.predicted === p.measured ? "equal" : `off by ${percent(Math.abs(p.measured / p.predicted - 1))}`) : p.p10 !== null && p.p90 !== null && p.measured >= p.p10 && p.measured <= p.p90 ? "inside the band" : "outside the band") },
      ]} />}
      {run.notes.map((note) => <p key={note}>{note}</p>)}
      <button type="button" onClick={() => set({
        screen: "verdict", model: run.model, machine: run.machine, batch: String(run.batch), prompt: String(run.prompt), gen: String(run.gen), techniques: run.techniques, dtype: run.dtype, kv: run.kv_dtype,
      })}>Open its case</button>
    </section>
  );
}
