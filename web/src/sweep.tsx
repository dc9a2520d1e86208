/** Screen 3: memory and latency over batch and context, where they cross, and what fits. */

import * as Plot from "@observablehq/plot";
import { type Sweep, call, follow, prediction } from "./api";
import { Chart, Table } from "./chart";
import { bytes, seconds, si, whole } from "./format";
import { current, isCase, set, view } from "./state";
import { Waiting } from "./verdict";
import { Empty, Num } from "./why";

const BATCHES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512];
const PROMPTS = [128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072];

/** A limit in milliseconds as typed, in seconds; null: none, or no number. */
const limit = (text: string): number | null => (Number(text) > 0 ? Number(text) / 1e3 : null);

const answer = follow<string, Sweep>(
  () => {
    const c = current.value;
    if (view.value.screen !== "sweep" || !isCase(c)) return null;
    const around = (axis: number[], own: number) => [...new Set([...axis, own])].sort((a, b) => a - b);
    return JSON.stringify({
      ...c, batches: around(BATCHES, c.batch), prompts: around(PROMPTS, c.prompt), ttft_limit_s: limit(view.value.ttft), tpot_limit_s: limit(view.value.tpot),
    });
  },
  async (text, abort) => {
    await new Promise((done) => setTimeout(done, 60));
    return call("post", "/api/sweep", JSON.parse(text), abort);
  },
);

export function SweepScreen() {
  const { value, error, busy } = answer.found.value;
  const c = current.value;
  if (!isCase(c)) return <Waiting />;
  return (
    <>
      <h1>Memory and latency over batch and context</h1>
      <div class="row">
        <Limit name="ttft" label="TTFT limit, ms" />
        <Limit name="tpot" label="TPOT limit, ms" />
      </div>
      {error && error.param === "" && <p class="error" role="alert">{error.message}</p>}
      {!value && (busy ? <p class="busy">Pricing {BATCHES.length * PROMPTS.length} cases.</p> : <Empty command="trimtab fit llama-3.1-8b --on a100">{error?.message ?? "Nothing is priced yet."}</Empty>)}
      {value && (
        <>
          <Crossings found={value} />
          <div class="pair">
            <MemoryLines found={value} batch={c.batch} />
            <Latency found={value} prompt={c.prompt} />
          </div>
          <Heat found={value} batch={c.batch} prompt={c.prompt} />
        </>
      )}
    </>
  );
}

function Limit({ name, label }: { name: "ttft" | "tpot"; label: string }) {
  const text = view.value[name];
  const bad = text.trim() !== "" && limit(text) === null;
  return (
    <div class="field">
      <label for={`f-${name}`}>{label}</label>
      <input id={`f-${name}`} size={7} inputMode="decimal" placeholder="none" value={text} aria-invalid={bad || undefined} onInput={(e) => set({ [name]: e.currentTarget.value })} />
      {bad && <p class="error" role="alert">{text} is no limit. Allowed: milliseconds above 0; empty for none.</p>}
    </div>
  );
}

function Crossings({ found }: { found: Sweep }) {
  return (
    <section aria-labelledby="crossings">
      <h2 id="crossings">Where it changes</h2>
      {found.crossings.length === 0 && <p>Nothing changes up to batch 1,024.</p>}
      <ul>
        {found.crossings.map((each) => (
          <li key={each.text}>
            {each.text}{" "}
            {each.at > 1 && each.what !== "positions" && (
              <button type="button" onClick={() => set({ [each.axis]: String(each.what === "capacity" ? each.at - 1 : each.at) })}>
                Go to {each.axis} {whole(each.what === "capacity" ? each.at - 1 : each.at)}
              </button>
            )}
          </li>
        ))}
      </ul>
    </section>
  );
}

const tokens = (value: number) => (value >= 1024 ? `${Math.round(value / 1024)}k` : String(value));

type Cell = Sweep["cells"][number];

/** Where a number of a cell comes from: the same case with another batch or prompt. */
function Of({ cell, name, what, children }: { cell: Cell; name: string; what: string; children: string }) {
  const command = (prediction.found.value.value?.command ?? "trimtab predict").replace(/--(batch|concurrency) \d+/, `--$1 ${cell.batch}`).replace(/--prompt \d+/, `--prompt ${cell.prompt}`);
  const text = `${what} of this case at batch ${whole(cell.batch)} and ${whole(cell.prompt)} prompt tokens, priced as every prediction (formula, inputs, sources and band by the command below).\nPeak ${bytes(cell.peak_bytes)}, cache ${bytes(cell.kv_bytes)}; mostly bound by ${cell.bound}.\nCheck: ${command} --explain ${name}`;
  return <Num title={`${what} at batch ${cell.batch}, prompt ${cell.prompt}`} text={text}>{children}</Num>;
}

function MemoryLines({ found, batch }: { found: Sweep; batch: number }) {
  const cells = found.cells.filter((cell) => cell.batch === batch);
  const lines = cells.flatMap((cell) => [
    { prompt: cell.prompt, what: "cache", value: cell.kv_bytes },
    { prompt: cell.prompt, what: "total", value: cell.peak_bytes },
    { prompt: cell.prompt, what: "weights", value: found.weight_bytes },
  ]);
  const crossings = found.crossings.filter((each) => each.axis === "prompt" && cells.length && each.at <= (cells.at(-1)?.prompt ?? 0));
  const options = (): Plot.PlotOptions => ({
    x: { type: "log", base: 2, label: "prompt tokens →", tickFormat: tokens, ticks: 6 },
    y: { type: "log", base: 2, label: "↑ bytes", grid: true, tickFormat: bytes, ticks: 6 },
    color: { domain: ["weights", "cache", "total"], range: ["var(--weights)", "var(--cache)", "currentColor"], legend: true },
    marks: [
      Plot.ruleY([found.capacity_bytes], { stroke: "var(--bad)", strokeDasharray: "5 3" }),
      Plot.text([found.capacity_bytes], { y: (d: number) => d, frameAnchor: "left", text: () => `capacity ${bytes(found.capacity_bytes)}`, textAnchor: "start", dy: -7, dx: 4, fill: "currentColor" }),
      Plot.ruleX(crossings, { x: "at", stroke: "currentColor", strokeOpacity: 0.5 }),
      Plot.text(crossings, { x: "at", frameAnchor: "bottom", text: "what", rotate: -90, textAnchor: "start", dx: -6, dy: -4, fill: "currentColor" }),
      Plot.lineY(lines, { x: "prompt", y: "value", stroke: "what", strokeWidth: 2 }),
      Plot.dot(lines, { x: "prompt", y: "value", fill: "what", r: 2.5, className: "cell" }),
    ],
  });
  return (
    <Chart title={`Memory over prompt length at batch ${whole(batch)}`} options={options} on={[found, batch]}>
      <Table caption="Memory over prompt length" rows={cells} columns={[
        { title: "prompt", number: true, cell: (r) => whole(r.prompt) },
        { title: "weights", number: true, cell: () => bytes(found.weight_bytes) },
        { title: "cache", number: true, cell: (r) => <Of cell={r} name="kv_peak_bytes" what="cache">{bytes(r.kv_bytes)}</Of> },
        { title: "total", number: true, cell: (r) => <Of cell={r} name="peak_bytes" what="peak memory">{bytes(r.peak_bytes)}</Of> },
        { title: "fits", cell: (r) => (r.fits ? "yes" : "no") },
      ]} />
    </Chart>
  );
}

function Latency({ found, prompt }: { found: Sweep; prompt: number }) {
  const cells = found.cells.filter((cell) => cell.prompt === prompt);
  const lines = cells.flatMap((cell) => [
    { batch: cell.batch, what: "TTFT", value: cell.ttft_s, fits: cell.fits },
    ...(cell.tpot_s === null ? [] : [{ batch: cell.batch, what: "TPOT", value: cell.tpot_s, fits: cell.fits }]),
  ]);
  const limits = [["TTFT", limit(view.value.ttft)], ["TPOT", limit(view.value.tpot)]].flatMap(([what, value]) => (value ? [{ what: String(what), value: Number(value) }] : []));
  const crossings = found.crossings.filter((each) => each.axis === "batch" && each.at <= (cells.at(-1)?.batch ?? 0));
  const options = (): Plot.PlotOptions => ({
    x: { type: "log", base: 2, label: "batch →", tickFormat: String, ticks: 8 },
    y: { type: "log", label: "↑ seconds", grid: true, tickFormat: seconds, ticks: 6 },
    color: { domain: ["TTFT", "TPOT"], range: ["var(--compute)", "var(--memory)"], legend: true },
    marks: [
      Plot.ruleY(limits, { y: "value", stroke: "what", strokeDasharray: "5 3" }),
      Plot.ruleX(crossings, { x: "at", stroke: "currentColor", strokeOpacity: 0.5 }),
      ...[0, 1].map((odd) => // in turn at the top and at the bottom: two may lie close together
        Plot.text(crossings.filter((_, i) => i % 2 === odd), {
          x: "at", frameAnchor: odd ? "bottom" : "top", text: "what", rotate: -90, textAnchor: odd ? "start" : "end", dx: -6, dy: odd ? -4 : 4, fill: "currentColor", className: "crossing",
        })),
      Plot.lineY(lines, { x: "batch", y: "value", stroke: "what", strokeWidth: 2 }),
      Plot.dot(lines, { x: "batch", y: "value", stroke: "what", fill: (d) => (d.fits ? d.what : "none"), r: 3, className: "cell" }),
    ],
  });
  return (
    <Chart title={`Latency over batch at ${whole(prompt)} prompt tokens (hollow: does not fit)`} options={options} on={[found, prompt, view.value.ttft, view.value.tpot]}>
      <Table caption="Latency over batch" rows={cells} columns={[
        { title: "batch", number: true, cell: (r) => whole(r.batch) },
        { title: "TTFT", number: true, cell: (r) => <Of cell={r} name="ttft_s" what="TTFT">{seconds(r.ttft_s)}</Of> },
        { title: "TPOT", number: true, cell: (r) => (r.tpot_s === null ? "none" : <Of cell={r} name="tpot_s" what="TPOT">{seconds(r.tpot_s)}</Of>) },
        { title: "tokens/s", number: true, cell: (r) => (r.tokens_per_s === null ? "none" : <Of cell={r} name="tokens_per_s" what="tokens per second">{si(r.tokens_per_s)}</Of>) },
        { title: "bound", cell: (r) => r.bound },
        { title: "fits", cell: (r) => (r.fits ? "yes" : "no") },
      ]} />
    </Chart>
  );
}

function Heat({ found, batch, prompt }: { found: Sweep; batch: number; prompt: number }) {
  const cells = found.cells.filter((cell) => cell.tokens_per_s !== null);
  const batches = [...new Set(cells.map((cell) => cell.batch))];
  const prompts = [...new Set(cells.map((cell) => cell.prompt))];
  const own = cells.filter((cell) => cell.batch === batch && cell.prompt === prompt);
  const rates = cells.filter((c) => c.fits).map((c) => c.tokens_per_s ?? 1);
  const middle = Math.sqrt(Math.min(...rates) * Math.max(...rates)); // of a scale by logarithm
  const options = (width: number): Plot.PlotOptions => ({
    marginBottom: 40,
    x: { type: "band", domain: batches, label: "batch →" },
    y: { type: "band", domain: [...prompts].reverse(), label: "↑ prompt tokens", tickFormat: tokens },
    color: { type: "log", scheme: "blues", label: "tokens/s" },
    marks: [
      Plot.cell(cells.filter((c) => c.fits), { x: "batch", y: "prompt", fill: "tokens_per_s", inset: 0.5, className: "fits", title: (c) => `batch ${c.batch}, prompt ${c.prompt}: ${si(c.tokens_per_s)} tokens/s` }),
      Plot.cell(cells.filter((c) => !c.fits), { x: "batch", y: "prompt", fill: "url(#hatch)", inset: 0.5, className: "over", title: (c) => `batch ${c.batch}, prompt ${c.prompt}: does not fit, ${bytes(c.peak_bytes)}` }),
      Plot.text(width > 600 ? cells.filter((c) => c.fits) : [], { x: "batch", y: "prompt", text: (c) => si(c.tokens_per_s), fill: (c) => ((c.tokens_per_s ?? 0) > middle ? "white" : "black") }),
      Plot.cell(own, { x: "batch", y: "prompt", fill: "none", stroke: "var(--accent)", strokeWidth: 3 }),
    ],
  });
  const hatch = (plot: Element) => {
    const svg = plot.matches("svg") ? plot : [...plot.querySelectorAll("svg")].at(-1);
    svg?.insertAdjacentHTML("afterbegin", '<defs><pattern id="hatch" width="7" height="7" patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><rect width="7" height="7" fill="none"/><line x1="0" y1="0" x2="0" y2="7" stroke="var(--bad)" stroke-width="2"/></pattern></defs>');
    for (const [name, rows] of [["fits", cells.filter((c) => c.fits)], ["over", cells.filter((c) => !c.fits)]] as const)
      for (const element of plot.querySelectorAll<SVGElement>(`.${name} rect`)) {
        const cell = rows[(element as unknown as { __data__: number }).__data__];
        if (cell) element.addEventListener("click", () => set({ batch: String(cell.batch), prompt: String(cell.prompt) }));
      }
  };
  return (
    <Chart title="Tokens per second over batch and prompt length (hatched: does not fit)" height={420} options={options} on={[found, batch, prompt]} ready={hatch}>
      <Table caption="Tokens per second" rows={prompts} rowKey={String} columns={[
        { title: "prompt", number: true, cell: (p) => whole(p) },
        ...batches.map((b) => ({
          title: `batch ${b}`, number: true,
          cell: (p: number) => {
            const cell = cells.find((each) => each.batch === b && each.prompt === p);
            return cell?.fits ? <Of cell={cell} name="tokens_per_s" what="tokens per second">{si(cell.tokens_per_s ?? 0)}</Of> : "does not fit";
          },
        })),
      ]} />
    </Chart>
  );
}
