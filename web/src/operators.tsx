/** Screen 2: the operator table and the roofline, one selection between them. */

import { computed, effect, signal } from "@preact/signals";
import * as Plot from "@observablehq/plot";
import { type Compat, type Op, type Predict, call, follow, prediction } from "./api";
import { Chart, Table, points } from "./chart";
import { percent, seconds, si } from "./format";
import { current, isCase, set, view } from "./state";
import { Waiting } from "./verdict";
import { Num } from "./why";

interface Dot extends Op {
  share: number;
  intensity: number;
  rate: number;
}

/** The rows of a phase, each with its share of the phase's time. */
function dots(ops: readonly Op[], phase: string): Dot[] {
  const rows = ops.filter((op) => op.phase === phase);
  const total = rows.reduce((sum, op) => sum + op.time_s, 0) || 1;
  return rows.map((op) => ({ ...op, share: op.time_s / total, intensity: op.flops / (op.bytes || 1), rate: op.flops / (op.time_s || 1) }));
}

const SORTS = {
  name: (d: Dot) => d.name, count: (d: Dot) => d.count, flops: (d: Dot) => d.flops, bytes: (d: Dot) => d.bytes,
  intensity: (d: Dot) => d.intensity, bound: (d: Dot) => d.bound, time_s: (d: Dot) => d.time_s,
} as const;

const sorted = (rows: Dot[]): Dot[] => {
  const down = view.value.sort.startsWith("-");
  const by = SORTS[view.value.sort.replace("-", "") as keyof typeof SORTS] ?? SORTS.time_s;
  return [...rows].sort((a, b) => {
    const [x, y] = [by(a), by(b)];
    return (x < y ? -1 : x > y ? 1 : 0) * (down ? -1 : 1);
  });
};

export const rowNames = computed(() => sorted(dots(prediction.found.value.value?.report.ops ?? [], view.value.phase)).map((d) => d.name));

/** Names without what all of them begin with. */
const brief = (name: string) => name.replace("layers.*.", "");

export function Operators() {
  const found = prediction.found.value.value;
  if (!found) return <Waiting />;
  const phases = [...new Set(found.report.ops.map((op) => op.phase))];
  const phase = phases.includes(view.value.phase) ? view.value.phase : (phases[0] ?? "prefill");
  const rows = sorted(dots(found.report.ops, phase));
  return (
    <>
      <h1>Operators of {phase}</h1>
      <div class="row">
        <fieldset class="tabs">
          <legend>Phase</legend>
          {phases.map((each) => (
            <label key={each}>
              <input type="radio" name="phase" checked={each === phase} onChange={() => set({ phase: each, brush: [] })} /> {each}
            </label>
          ))}
        </fieldset>
        <label class="check">
          <input type="checkbox" checked={view.value.per === "call"} onChange={(e) => set({ per: e.currentTarget.checked ? "call" : "all" })} />
          of one call, not of all
        </label>
        <Slider name="batch" label="Batch" most={10} />
        <Slider name="prompt" label="Prompt tokens" most={17} />
      </div>
      <div class="split wide">
        <OpTable rows={rows} found={found} />
        <Roofline rows={rows} before={dots(found.base?.ops ?? [], phase)} found={found} phase={phase} />
      </div>
      <Sum rows={rows} />
      <Viewer />
    </>
  );
}

/** Powers of two; between them the field above takes any number. */
function Slider({ name, label, most }: { name: "batch" | "prompt"; label: string; most: number }) {
  const now = Math.log2(Math.max(Number(view.value[name]) || 1, 1));
  return (
    <label class="slider">
      {label} <output>{view.value[name]}</output>
      <input type="range" min={0} max={most} step={1} value={Math.min(Math.round(now), most)} aria-label={`${label}, powers of two`}
        onInput={(event) => set({ [name]: String(2 ** Number(event.currentTarget.value)) })} />
    </label>
  );
}

const HEADS: [keyof typeof SORTS | "shape" | "share", string][] = [
  ["name", "operator"], ["shape", "shape"], ["count", "calls"], ["flops", "FLOP"], ["bytes", "bytes"], ["intensity", "FLOP/B"],
  ["bound", "bound"], ["time_s", "time"], ["share", "share"],
];

const why = (d: Dot, found: Predict): string => {
  const peak = found.peaks.find((p) => p.dtype === d.dtype);
  const memory = found.bandwidths.at(-1);
  return [
    `${d.name}, ${d.phase}: ${d.kind} ${d.shape} in ${d.dtype}, ${d.count} calls`,
    `FLOP ${d.flops.toExponential(4)} (matrix products, 2 per multiply-add), bytes ${d.bytes.toExponential(4)} (weights, cache, activations)`,
    `intensity = FLOP / bytes = ${d.intensity.toPrecision(4)} FLOP/B`,
    peak && memory ? `ridge = ${si(peak.flops_per_s, "FLOP/s")} (${peak.priced_as}) / ${si(memory.bytes_per_s, "B/s")} = ${(peak.flops_per_s / memory.bytes_per_s).toPrecision(4)} FLOP/B` : "",
    `time = ${d.time_s.toExponential(4)} s over all calls, most of it bound by ${d.bound}; ${percent(d.share)} of the phase`,
    `Sources: ${found.report.figures["tpot_s"]?.why ?? ""}`,
    `Check: ${found.command} --json (ops)`,
  ].filter(Boolean).join("\n");
};

function OpTable({ rows, found }: { rows: Dot[]; found: Predict }) {
  const each = view.value.per === "call";
  const { sort, selected, brush } = view.value;
  const of = (d: Dot, value: number) => (each ? value / (d.count || 1) : value);
  return (
    <div class="scroll ops" tabIndex={0} role="region" aria-label="Operators">
      <table>
        <caption>{each ? "One call of each operator" : "All calls of each operator, layers together"}</caption>
        <thead>
          <tr>
            {HEADS.map(([name, title]) => (
              <th key={name} scope="col" class={["name", "shape", "bound"].includes(name) ? "" : "r"}
                aria-sort={sort.replace("-", "") === name ? (sort.startsWith("-") ? "descending" : "ascending") : undefined}>
                {name in SORTS ? <button type="button" onClick={() => set({ sort: sort === `-${name}` ? name : `-${name}` })}>{title}</button> : title}
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {rows.map((d) => (
            <tr key={d.name} data-row={d.name} aria-selected={d.name === selected} class={brush.length && !brush.includes(d.name) ? "dim" : ""}
              onMouseEnter={() => (hovered.value = d.name)} onMouseLeave={() => (hovered.value = "")}>
              <td><button type="button" class="num" aria-label={`Select ${d.name}`} onClick={() => set({ selected: d.name === selected ? "" : d.name })}>{brief(d.name)}</button></td>
              <td class="n">{d.shape.replace("->", "→")}</td>
              <td class="r">{d.count}</td>
              <td class="r" data-col="flops"><Num title={`FLOP of ${d.name}`} text={why(d, found)}>{si(of(d, d.flops))}</Num></td>
              <td class="r" data-col="bytes"><Num title={`bytes of ${d.name}`} text={why(d, found)}>{si(of(d, d.bytes), "B")}</Num></td>
              <td class="r" data-col="intensity"><Num title={`intensity of ${d.name}`} text={why(d, found)}>{d.intensity.toPrecision(3)}</Num></td>
              <td data-col="bound" class={`b-${d.bound}`}>{d.bound}</td>
              <td class="r" data-col="time"><Num title={`time of ${d.name}`} text={why(d, found)}>{seconds(of(d, d.time_s))}</Num></td>
              <td class="r"><Num title={`share of ${d.name}`} text={why(d, found)}>{percent(d.share)}</Num></td>
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}

/** The operator under the pointer, in the table or among the dots; lit without drawing anew, so that a drag may begin on it. */
const hovered = signal("");
function light(): void {
  const lit = hovered.value || view.value.selected;
  for (const dot of document.querySelectorAll<SVGElement>("circle[data-op]")) {
    dot.classList.toggle("lit", dot.dataset["op"] === lit);
    dot.classList.toggle("unlit", lit !== "" && dot.dataset["op"] !== lit);
  }
  for (const row of document.querySelectorAll<HTMLElement>(".ops tr[data-row]")) row.classList.toggle("lit", row.dataset["row"] === hovered.value);
}
effect(light);

const COLOURS = { domain: ["compute", "memory", "launch", "comm"], range: ["var(--compute)", "var(--memory)", "var(--launch)", "var(--comm)"] };

function Roofline({ rows, before, found, phase }: { rows: Dot[]; before: Dot[]; found: Predict; phase: string }) {
  const plotted = rows.filter((d) => d.flops > 0 && d.bytes > 0);
  const old = new Map(before.map((d) => [d.name, d]));
  const moved = plotted.flatMap((d) => {
    const was = old.get(d.name);
    return was && was.flops > 0 && (Math.abs(was.intensity / d.intensity - 1) > 0.005 || Math.abs(was.rate / d.rate - 1) > 0.005)
      ? [{ name: d.name, x1: was.intensity, y1: was.rate, x2: d.intensity, y2: d.rate }] : [];
  });
  const best = Math.max(...found.peaks.map((p) => p.flops_per_s), 1);
  const xs = [...plotted.map((d) => d.intensity), ...moved.map((m) => m.x1)];
  const ridges = found.bandwidths.map((b) => best / b.bytes_per_s);
  const low = Math.min(...xs, 1) / 2;
  const high = Math.max(...xs, ...ridges) * 4;
  const floor = Math.min(...plotted.map((d) => d.rate), ...moved.map((m) => m.y1), best) / 4;
  const lines = found.bandwidths.flatMap((b) => [
    { name: b.name, x: Math.max(low, floor / b.bytes_per_s), y: Math.max(low * b.bytes_per_s, floor) },
    { name: b.name, x: best / b.bytes_per_s, y: best },
  ]);
  // Each name on its own side of the lines, one higher than the other.
  const names = found.bandwidths.map((b, i) => {
    const x = Math.sqrt(Math.max(low, floor / b.bytes_per_s) * (best / b.bytes_per_s)) * (i === found.bandwidths.length - 1 ? 0.4 : 2);
    return { name: b.name, x, y: x * b.bytes_per_s };
  });
  const roofs = found.peaks.map((p) => ({ ...p, x1: p.flops_per_s / Math.max(...found.bandwidths.map((b) => b.bytes_per_s)), x2: high }));
  const { selected } = view.value;
  const options = (): Plot.PlotOptions => ({
    x: { type: "log", domain: [low, high], label: "FLOP per byte →", grid: true, tickFormat: (v: number) => si(v) },
    y: { type: "log", domain: [floor, best * 2], label: "↑ FLOP/s", grid: true, tickFormat: (v: number) => si(v) },
    color: COLOURS,
    r: { domain: [0, 1], range: [3, 26], type: "sqrt" },
    marks: [
      Plot.line(lines, { x: "x", y: "y", z: "name", stroke: "currentColor", strokeWidth: 1.5, className: "ridge" }),
      Plot.text(names.slice(0, -1), { x: "x", y: "y", text: "name", dx: -8, dy: -4, textAnchor: "end", fill: "currentColor" }),
      Plot.text(names.slice(-1), { x: "x", y: "y", text: "name", dx: 8, dy: 8, textAnchor: "start", fill: "currentColor" }),
      Plot.link(roofs, { x1: "x1", x2: "x2", y1: "flops_per_s", y2: "flops_per_s", stroke: "currentColor", strokeWidth: 1.5, className: "roof" }),
      Plot.text(roofs, { x: "x2", y: "flops_per_s", text: (p) => `${p.dtype}${p.priced_as === p.dtype ? "" : ` as ${p.priced_as}`} ${si(p.flops_per_s, "FLOP/s")}`, textAnchor: "end", dy: -7, fill: "currentColor" }),
      Plot.dot(moved, { x: "x1", y: "y1", r: 5, fill: "none", stroke: "currentColor", strokeDasharray: "2 2", className: "ghost" }),
      Plot.arrow(moved, { x1: "x1", y1: "y1", x2: "x2", y2: "y2", stroke: "currentColor", strokeOpacity: 0.6, headLength: 6 }),
      Plot.dot(plotted, {
        x: "intensity", y: "rate", r: "share", sort: null, fill: "bound", className: "op",
        ariaLabel: (d: Dot) => `${d.name}: ${d.intensity.toPrecision(3)} FLOP/B, ${si(d.rate, "FLOP/s")}, ${d.bound}`,
      }),
      Plot.text(plotted.filter((d) => d.name === selected), { x: "intensity", y: "rate", text: (d) => brief(d.name), dy: -16, fill: "currentColor", fontWeight: "bold" }),
    ],
  });
  return (
    <Chart title={`Roofline of ${phase}: dots are operators, their area is time; drag to sum several`} height={420} options={options}
      on={[found, phase, selected]} ready={(plot) => wire(plot, plotted)}>
      <Table caption="Roofline" rows={plotted} columns={[
        { title: "operator", cell: (d) => brief(d.name) },
        { title: "FLOP/B", number: true, cell: (d) => d.intensity.toPrecision(3) },
        { title: "FLOP/s", number: true, cell: (d) => si(d.rate) },
        { title: "bound", cell: (d) => d.bound },
        { title: "before", number: true, cell: (d) => (moved.some((m) => m.name === d.name) ? `${old.get(d.name)?.intensity.toPrecision(3)} FLOP/B, ${si(old.get(d.name)?.rate ?? 0)}FLOP/s` : "the same") },
      ]} />
      {rows.length > plotted.length && <p>Not drawn, for they multiply no matrices: {rows.filter((d) => !plotted.includes(d)).map((d) => brief(d.name)).join(", ")}.</p>}
    </Chart>
  );
}

/** Clicks select a dot, dragging sums all dots inside the frame. */
function wire(plot: Element & Plot.Plot, rows: Dot[]): void {
  const svg = plot instanceof SVGSVGElement ? plot : plot.querySelector("svg");
  const [x, y] = [plot.scale("x"), plot.scale("y")];
  if (!svg || !x || !y) return;
  for (const { index, element } of points(plot, "op")) {
    const name = rows[index]?.name ?? "";
    element.dataset["op"] = name;
    element.addEventListener("pointerenter", () => (hovered.value = name));
    element.addEventListener("pointerleave", () => (hovered.value = ""));
  }
  light();
  let start: DOMPoint | null = null;
  let frame: SVGRectElement | null = null;
  const at = (event: PointerEvent) => {
    const box = svg.getBoundingClientRect();
    const size = svg.viewBox.baseVal;
    return new DOMPoint(((event.clientX - box.left) * size.width) / box.width, ((event.clientY - box.top) * size.height) / box.height);
  };
  svg.addEventListener("pointerdown", (event) => {
    start = at(event);
    event.preventDefault();
  });
  const move = (event: PointerEvent) => {
    if (!start) return;
    const now = at(event);
    if (!frame && Math.hypot(now.x - start.x, now.y - start.y) < 5) return;
    if (!frame) {
      frame = document.createElementNS("http://www.w3.org/2000/svg", "rect");
      frame.setAttribute("class", "brush");
      svg.append(frame);
      svg.setPointerCapture(event.pointerId);
    }
    for (const [name, value] of [["x", Math.min(now.x, start.x)], ["y", Math.min(now.y, start.y)], ["width", Math.abs(now.x - start.x)], ["height", Math.abs(now.y - start.y)]] as const)
      frame.setAttribute(name, String(value));
  };
  const end = (event: PointerEvent) => {
    const [from, to] = [start, at(event)];
    start = null;
    if (!from) return;
    if (!frame) {
      const name = (event.target as SVGElement).dataset?.["op"];
      set(name ? { selected: name === view.value.selected ? "" : name } : { brush: [] });
      return;
    }
    frame.remove();
    frame = null;
    const inside = rows.filter((d) => {
      const [px, py] = [x.apply(d.intensity), y.apply(d.rate)];
      return px >= Math.min(from.x, to.x) && px <= Math.max(from.x, to.x) && py >= Math.min(from.y, to.y) && py <= Math.max(from.y, to.y);
    });
    set({ brush: inside.map((d) => d.name) });
  };
  svg.addEventListener("pointermove", move);
  svg.addEventListener("pointerup", end);
}

function Sum({ rows }: { rows: Dot[] }) {
  const inside = rows.filter((d) => view.value.brush.includes(d.name));
  const picked = rows.find((d) => d.name === view.value.selected);
  const toggle = () => picked && set({ brush: view.value.brush.includes(picked.name) ? view.value.brush.filter((n) => n !== picked.name) : [...view.value.brush, picked.name] });
  const sum = (of: (d: Dot) => number) => inside.reduce((total, d) => total + of(d), 0);
  return (
    <p class="sum" role="status">
      {inside.length > 0
        ? `Sum of ${inside.length}: ${si(sum((d) => d.flops), "FLOP")}, ${si(sum((d) => d.bytes), "B")}, ${seconds(sum((d) => d.time_s))}, ${percent(sum((d) => d.share))} of the phase. `
        : "Drag over dots, or select rows and add them, to sum several. "}
      {picked && <button type="button" onClick={toggle}>{inside.includes(picked) ? "Take" : "Add"} {brief(picked.name)} {inside.includes(picked) ? "out of" : "to"} the sum</button>}{" "}
      {inside.length > 0 && <button type="button" onClick={() => set({ brush: [] })}>Clear</button>}
    </p>
  );
}

const compat = follow<string, Compat>(
  () => (view.value.viewer && view.value.screen === "operators" && isCase(current.value) ? JSON.stringify(current.value) : null),
  (text, abort) => call("post", "/api/compat", JSON.parse(text), abort),
);

/** What LLM-Viewer would have said. */
function Viewer() {
  const { value, error } = compat.found.value;
  const stage = view.value.phase === "prefill" ? value?.prefill : value?.decode;
  return (
    <details class="viewer" open={view.value.viewer} onToggle={(event) => set({ viewer: event.currentTarget.open })}>
      <summary>What LLM-Viewer says of this case</summary>
      {error && <p class="error" role="alert">{error.message}</p>}
      {view.value.viewer && stage && (
        <>
          <Table caption={`${value?.tool}, one layer, 16 bits`} rows={stage.operators} columns={[
            { title: "operator", cell: (r) => r.name },
            { title: "times", number: true, cell: (r) => r.times },
            { title: "operations", number: true, cell: (r) => si(r.ops, "OP") },
            { title: "bytes", number: true, cell: (r) => si(r.bytes, "B") },
            { title: "OP/B", number: true, cell: (r) => (r.ops / (r.bytes || 1)).toPrecision(3) },
            { title: "bound", cell: (r) => r.bound },
            { title: "time of one", number: true, cell: (r) => seconds(r.time_s) },
          ]} />
          <Table caption="What its faults add" rows={stage.faults.filter((f) => f.ops || f.bytes || f.time_s)} columns={[
            { title: "fault", cell: (f) => f.name },
            { title: "operations", number: true, cell: (f) => si(f.ops, "OP") },
            { title: "bytes", number: true, cell: (f) => si(f.bytes, "B") },
            { title: "time", number: true, cell: (f) => seconds(f.time_s) },
            { title: "what is wrong", cell: (f) => f.sentence },
          ]} />
        </>
      )}
    </details>
  );
}
