/** Screen 1: does it fit, what limits it, what would help most. */

import { computed } from "@preact/signals";
import { type Delta, type Predict, call, follow, machines, prediction, runs, techniques } from "./api";
import { addTechnique } from "./bar";
import { Table } from "./chart";
import { bytes, change, percent, shown } from "./format";
import { MeasureButton } from "./measure";
import { current, isCase, view } from "./state";
import { Command, Empty, Num } from "./why";

const FIGURES = [
  ["ttft_s", "Time to first token"],
  ["tpot_s", "Time per further token"],
  ["tokens_per_s", "Tokens per second"],
  ["energy_j_per_token", "Energy per token"],
  ["usd_per_million_tokens", "Per million tokens"],
] as const;

const BOUND: Record<string, string> = {
  compute: "arithmetic", memory: "memory bandwidth", launch: "kernel launches", comm: "traffic between devices",
};

/** Parts of the memory bar, from the bottom. */
const PARTS = [
  ["weight_bytes", "weights"],
  ["kv_peak_bytes", "cache"],
  ["activation_bytes", "activations"],
  ["reserve_bytes", "engine reserve"],
] as const;

export function Waiting() {
  const { error, busy } = prediction.found.value;
  return <Empty command="trimtab predict llama-3.1-8b --on a100">{error?.message ?? (busy ? "Pricing." : "Nothing is priced yet: put right what is marked above.")}</Empty>;
}

export function Verdict() {
  const found = prediction.found.value.value;
  if (!found) return <Waiting />;
  const { counts, figures, notes, plan } = found.report;
  return (
    <>
      <h1 class={found.fits ? "good" : "bad"}>
        {found.fits ? "Fits" : "Does not fit"} {String(plan["machine"])}:{" "}
        <Num title="peak memory" name="peak_bytes">{bytes(counts["peak_bytes"] ?? 0)}</Num> of{" "}
        <Num title="memory the engine may use" name="capacity_bytes">{bytes(found.capacity_bytes)}</Num>
      </h1>
      <p class="limits">
        {Object.entries(found.bounds).map(([phase, b]) => (
          <span key={phase}>
            {phase} is limited by <b>{BOUND[b.bound] ?? b.bound}</b>{" "}
            <Num title={`what limits ${phase}`} text={`Each kernel is bound by the largest of its arithmetic, memory, launch and communication times. Of the time of all ${phase} passes, ${percent(b.share)} is in kernels bound by ${BOUND[b.bound] ?? b.bound}.\nSource: the operator table of this prediction.\nCheck: ${found.command}`}>
              ({percent(b.share)} of its time)
            </Num>
            .{" "}
          </span>
        ))}
      </p>
      <dl class="kpis">
        {FIGURES.map(([name, label]) => {
          const figure = figures[name];
          const before = found.base?.figures[name];
          if (!figure) return null;
          return (
            <div key={name}>
              <dt>{label}</dt>
              <dd data-figure={name}>
                <Num title={label} name={name}>{shown(figure.value, figure.unit)}</Num>
                {figure.p10 !== null && figure.p90 !== null && (
                  <small>{shown(figure.p10, figure.unit)} to {shown(figure.p90, figure.unit)} ({figure.kind})</small>
                )}
                {before && <small class="was">without techniques {shown(before.value, before.unit)}</small>}
              </dd>
            </div>
          );
        })}
      </dl>
      <MemoryBar found={found} />
      {notes.length > 0 && (
        <section aria-labelledby="notes">
          <h2 id="notes">What to know</h2>
          <ul>{notes.map((note) => <li key={note}>{note}</li>)}</ul>
        </section>
      )}
      <Help found={found} />
      <section aria-labelledby="check">
        <h2 id="check">Check it</h2>
        <Command text={found.command} />
        <MeasureButton />
      </section>
    </>
  );
}

function MemoryBar({ found }: { found: Predict }) {
  const rows = [{ title: "with techniques", report: found.report }, ...(found.base ? [{ title: "without", report: found.base }] : [])];
  const most = Math.max(found.capacity_bytes, ...rows.map((row) => row.report.counts["peak_bytes"] ?? 0));
  const parts = PARTS.map(([name, label]) => ({ name: name as string, label: label as string, value: found.report.counts[name] ?? 0, was: found.base?.counts[name] ?? null as number | null }));
  const free = found.capacity_bytes - (found.report.counts["peak_bytes"] ?? 0);
  return (
    <section aria-labelledby="memory">
      <h2 id="memory">Memory</h2>
      {rows.map((row) => (
        <div key={row.title} class="memory" role="img"
          aria-label={`Memory${rows.length > 1 ? ` ${row.title}` : ""}: ${PARTS.map(([name, label]) => `${label} ${bytes(row.report.counts[name] ?? 0)}`).join(", ")}`}>
          {PARTS.map(([name]) => <span key={name} class={name} style={{ width: `${(100 * (row.report.counts[name] ?? 0)) / most}%` }} />)}
          <i style={{ left: `${(100 * found.capacity_bytes) / most}%` }} />
        </div>
      ))}
      <Table caption="Memory of one device at its fullest" rows={[...parts, { name: "capacity_bytes", label: free >= 0 ? "free" : "missing", value: Math.abs(free), was: null }]}
        rowKey={(row) => row.name}
        columns={[
          { title: "part", cell: (row) => <><span class={`swatch ${row.name}`} /> {row.label}</> },
          { title: "bytes", number: true, cell: (row) => <Num title={row.label} name={row.name}>{bytes(row.value)}</Num> },
          { title: "share of capacity", number: true, cell: (row) => percent(row.value / found.capacity_bytes) },
          ...(found.base ? [{ title: "without techniques", number: true, cell: (row: { was: number | null }) => (row.was === null ? "" : bytes(row.was)) }] : []),
        ]} />
    </section>
  );
}

/** Techniques on top of the case, priced a few at a time so that the page answers in between. */
const candidates = computed(() => {
  const names = techniques.found.value.value?.techniques.map((t) => t.name) ?? [];
  const have = new Set(view.value.techniques.map((text) => text.split(":")[0]));
  return JSON.stringify(names.filter((name) => !have.has(name)));
});

const asked = computed(() => {
  const c = current.value;
  const names = JSON.parse(candidates.value) as string[];
  return view.value.screen === "verdict" && isCase(c) && names.length > 0 && prediction.found.value.value ? JSON.stringify({ c, names }) : null;
});

export const deltas = follow<string, Delta[]>(
  () => asked.value,
  async (text, abort, part) => {
    const { c, names } = JSON.parse(text);
    await new Promise((done) => setTimeout(done, 400)); // a slider that still moves asks for nothing yet
    const found: Delta[] = [];
    for (let at = 0; at < names.length; at += 4) {
      if (abort.aborted) break;
      found.push(...(await call("post", "/api/deltas", { ...c, candidates: names.slice(at, at + 4) }, abort)).rows);
      part([...found]);
    }
    return found;
  },
);

/** Time of a whole request with a technique over without. */
function requestRatio(found: Predict, row: Delta): number {
  const first = found.report.figures["ttft_s"]?.value ?? 0;
  const rest = (found.report.figures["tpot_s"]?.value ?? 0) * Math.max(Number(view.value.gen) - 1, 0);
  return (first * (row.ttft ?? 1) + rest * (row.tpot ?? 1)) / (first + rest || 1);
}

/** What was measured of a technique's quality on this machine, worst first; empty: nothing was. */
export function quality(technique: string): string {
  const name = technique.split(":")[0] ?? "";
  const seen = (runs.found.value.value?.runs ?? []).filter((run) => run.techniques.some((text) => text.split(":")[0] === name) && run.quality["kl_nats"] !== undefined);
  const worst = seen.sort((a, b) => (b.quality["kl_nats"] ?? 0) - (a.quality["kl_nats"] ?? 0))[0];
  return worst ? `KL ${worst.quality["kl_nats"]?.toPrecision(2)} nats (${worst.model}, run ${worst.id})` : "";
}

function Help({ found }: { found: Predict }) {
  runs.once();
  const { value, busy, error } = deltas.found.value;
  const rows = (value ?? []).filter((row) => !row.refused).map((row) => ({ row, time: requestRatio(found, row) }));
  const useful = rows
    .filter(({ row, time }) => (time < 0.99 || (row.peak ?? 1) < 0.99) && (time < 1.02 || (!found.fits && row.fits)))
    .sort((a, b) => Number(!found.fits && b.row.fits) - Number(!found.fits && a.row.fits) || a.time + (a.row.peak ?? 1) - b.time - (b.row.peak ?? 1))
    .slice(0, 6);
  return (
    <section aria-labelledby="help" aria-busy={busy}>
      <h2 id="help">What would help most</h2>
      {error && <p class="error" role="alert">{error.message}</p>}
      {busy && <p class="busy">Pricing techniques on this case: {value?.length ?? 0} so far.</p>}
      {!busy && value && useful.length === 0 && <Empty command="trimtab techniques">No technique saves more than 1 % of time or memory here.</Empty>}
      <ul class="cards">
        {useful.map(({ row, time }) => (
          <li key={row.technique}>
            <h3><code>{row.technique}</code></h3>
            <p>
              Request time <Num title={`request time with ${row.technique}`} text={`(TTFT x ${row.ttft?.toFixed(3)} + (gen - 1) x TPOT x ${row.tpot?.toFixed(3)}) / (TTFT + (gen - 1) x TPOT) = ${time.toFixed(3)}\nBoth sides are predictions of the same case, with and without ${row.technique}.\nCheck: ${found.command} -t ${row.technique}`}>{change(time)}</Num>,
              memory <Num title={`memory with ${row.technique}`} text={`peak_bytes with over without ${row.technique} = ${row.peak?.toFixed(4)}\nCheck: ${found.command} -t ${row.technique} --explain peak_bytes`}>{change(row.peak)}</Num>
              {!found.fits && row.fits ? "; then it fits" : ""}.
            </p>
            <p class="risk">Quality: {quality(row.technique) || "not measured here"}.</p>
            <button type="button" onClick={() => addTechnique(row.technique)}>Add {row.technique}</button>
          </li>
        ))}
      </ul>
    </section>
  );
}

export const here = () => machines.found.value.value?.calibrated ?? false;
