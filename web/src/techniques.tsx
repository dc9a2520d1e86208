/** Screen 4: the ninety papers and their techniques: parameters, predicted deltas, claims. */

import { computed, useSignal } from "@preact/signals";
import { type Delta, type Paper, type Technique, call, papers, prediction, refusal, techniques } from "./api";
import { addTechnique } from "./bar";
import { Table } from "./chart";
import { change } from "./format";
import { current, isCase, set, view } from "./state";
import { quality } from "./verdict";
import { Command, Empty, Num } from "./why";

/** A paper, or a technique that no paper of the catalogue brings. */
interface Entry {
  id: string;
  title: string;
  short: string;
  family: string;
  state: string;
  seams: string[];
  paper: Paper | null;
  built: Technique[];
}

const entries = computed<Entry[]>(() => {
  const known = techniques.found.value.value?.techniques ?? [];
  const rows = papers.found.value.value?.papers ?? [];
  const own = (p: Paper) => known.filter((t) => t.paper === p.number || p.parts.includes(t.name));
  const placed = new Set(rows.flatMap((p) => own(p).map((t) => t.name)));
  return [
    ...rows.map((p) => ({ id: String(p.number), title: p.title, short: p.short, family: p.family, state: p.state, seams: p.seams, paper: p, built: own(p) })),
    ...known.filter((t) => !placed.has(t.name)).map((t) => ({ id: t.name, title: t.summary, short: t.name, family: "baseline", state: "implemented", seams: [t.seam], paper: null, built: [t] })),
  ];
});

const shownEntries = computed(() => {
  const words = view.value.search.toLowerCase().split(/\s+/).filter(Boolean);
  return entries.value.filter((e) => {
    const text = [e.id, e.title, e.short, e.family, e.state, ...e.seams, ...e.built.map((t) => t.name), ...(e.paper?.kinds ?? [])].join(" ").toLowerCase();
    return words.every((word) => text.includes(word));
  });
});

export const entryIds = computed(() => shownEntries.value.map((e) => e.id));

export function TechniqueScreen() {
  papers.once();
  const { error, busy } = papers.found.value;
  const open = entries.value.find((e) => e.id === view.value.paper);
  const filters = [...new Set(entries.value.map((e) => e.family))].sort();
  return (
    <>
      <h1>Techniques</h1>
      {error && <p class="error" role="alert">{error.message}</p>}
      {busy && <p class="busy">Reading the catalogue.</p>}
      <div class="row">
        <div class="field">
          <label for="f-search">Search (/)</label>
          <input id="f-search" type="search" size={28} placeholder="kv cache implemented" value={view.value.search} onInput={(e) => set({ search: e.currentTarget.value })} />
        </div>
        <div class="field">
          <label for="f-family">Family</label>
          <select id="f-family" onChange={(e) => set({ search: e.currentTarget.value })}>
            <option value="">all</option>
            {filters.map((f) => <option key={f} value={f} selected={view.value.search === f}>{f}</option>)}
          </select>
        </div>
        <p role="status">{shownEntries.value.length} of {entries.value.length}</p>
      </div>
      <div class="split">
        {shownEntries.value.length === 0 && !busy
          ? <Empty command="trimtab papers">Nothing matches "{view.value.search}". Clear the search to see all.</Empty>
          : <Table caption="Papers and baselines" rows={shownEntries.value} rowKey={(e) => e.id} selected={view.value.paper} columns={[
            { title: "no.", number: true, cell: (e) => e.paper?.number ?? "" },
            { title: "name", cell: (e) => <button type="button" class="num" aria-label={`Open ${e.short}`} onClick={() => set({ paper: e.id === view.value.paper ? "" : e.id })}>{e.short}</button> },
            { title: "family", cell: (e) => e.family },
            { title: "seam", cell: (e) => e.seams.join(", ") },
            { title: "state", cell: (e) => (e.built.length ? `${e.state}: ${e.built.map((t) => t.name).join(", ")}` : e.state) },
            { title: "claims", number: true, cell: (e) => e.paper?.claims.length || "" },
          ]} />}
        {open ? <Details entry={open} key={open.id} /> : <Empty>Choose a row (j, k) to see parameters, what it would change here, and its claims.</Empty>}
      </div>
    </>
  );
}

function Details({ entry }: { entry: Entry }) {
  const { paper } = entry;
  return (
    <section class="details" aria-labelledby="entry">
      <h2 id="entry">{entry.title}</h2>
      {paper && (
        <p>
          Paper {paper.number}, {paper.year}, {paper.kinds.join(", ")}; {paper.state}.{" "}
          {paper.arxiv && <a href={`https://arxiv.org/abs/${paper.arxiv}`} rel="noreferrer" target="_blank">arXiv {paper.arxiv}</a>}
        </p>
      )}
      {entry.built.length === 0 && <Empty command={`trimtab papers ${entry.id}`}>Nothing of it can be applied yet.</Empty>}
      {entry.built.map((technique) => <Form key={technique.name} technique={technique} />)}
      {paper && paper.claims.length > 0 && (
        <>
          <Table caption="Claims, and what they are checked against" rows={paper.claims} columns={[
            { title: "line", cell: (c) => c.id },
            { title: "claim", cell: (c) => c.text },
            { title: "needed", cell: (c) => c.needed },
            { title: "known not to hold", cell: (c) => c.documented || "" },
          ]} />
          <Command text={`trimtab verify ${paper.number}`} />
        </>
      )}
      {paper && paper.claims.length === 0 && <p>None of its claims is checked yet.</p>}
    </section>
  );
}

/** A form made from the dataclass; what is left at its default is left out of the spec string. */
function Form({ technique }: { technique: Technique }) {
  const values = useSignal<Record<string, string>>({});
  const spec = () => {
    const given = technique.parameters.filter((p) => (values.value[p.name] ?? p.default) !== p.default);
    return given.length ? `${technique.name}:${given.map((p) => `${p.name}=${values.value[p.name]}`).join(",")}` : technique.name;
  };
  const put = (name: string, value: string) => (values.value = { ...values.value, [name]: value });
  return (
    <form onSubmit={(event) => { event.preventDefault(); addTechnique(spec()); }}>
      <h3><code>{technique.name}</code>: {technique.summary}</h3>
      <p>Seam {technique.seam}, applied at stage {technique.stage}{technique.needs.length ? `; needs ${technique.needs.join(", ")}` : ""}.</p>
      <div class="parameters">
        {technique.parameters.map((p) => {
          const id = `p-${technique.name}-${p.name}`;
          const value = values.value[p.name] ?? p.default;
          const choices = p.kind === "bool" ? ["true", "false"] : p.choices;
          return (
            <div class="field" key={p.name}>
              <label for={id}>{p.name}</label>
              {choices.length > 0
                ? <select id={id} aria-describedby={`${id}-h`} onChange={(e) => put(p.name, e.currentTarget.value)}>{choices.map((c) => <option key={c} selected={c === value}>{c}</option>)}</select>
                : <input id={id} size={10} value={value} inputMode={p.kind === "int" || p.kind === "float" ? "decimal" : "text"} aria-describedby={`${id}-h`} onInput={(e) => put(p.name, e.currentTarget.value)} />}
              <small id={`${id}-h`}>{p.help}{p.help && !p.help.endsWith(".") && "."} {p.allowed && `Allowed: ${p.allowed}.`}</small>
            </div>
          );
        })}
      </div>
      <Here spec={spec()} />
      <p class="risk">Quality: {quality(technique.name) || `not measured here; trimtab measure MODEL -t ${technique.name} does.`}</p>
      <button type="submit">Add {spec()}</button>
      <details>
        <summary>What it does, and what the paper does differently</summary>
        <pre tabIndex={0}>{technique.doc}</pre>
      </details>
      <Fellows spec={spec()} />
    </form>
  );
}

/** What a spec string would change on the current case. */
function Here({ spec }: { spec: string }) {
  const found = useSignal<{ spec: string; row: Delta | null; error: string }>({ spec: "", row: null, error: "" });
  const key = JSON.stringify([current.value, spec]);
  if (found.value.spec !== key) {
    const c = current.value;
    found.value = { spec: key, row: null, error: "" };
    if (isCase(c))
      setTimeout(() => {
        if (found.value.spec !== key) return;
        call("post", "/api/deltas", { ...c, candidates: [spec] }).then(
          ({ rows }) => found.value.spec === key && (found.value = { spec: key, row: rows[0] ?? null, error: "" }),
          (error) => found.value.spec === key && (found.value = { spec: key, row: null, error: refusal(error).message }),
        );
      }, 150);
  }
  const { row, error } = found.value;
  if (error || row?.refused) return <p class="error" role="alert">{error || row?.refused}</p>;
  if (!row) return <p class="busy">Pricing {spec} on this case.</p>;
  const rows = ([["TTFT", row.ttft], ["TPOT", row.tpot], ["tokens per second", row.tokens_per_s], ["weights", row.weights], ["cache", row.kv], ["peak memory", row.peak]] as const).map(([what, ratio]) => ({ what, ratio }));
  return (
    <Table caption={`${spec} on this case, predicted`} rows={rows} columns={[
      { title: "figure", cell: (r) => r.what },
      { title: "change", number: true, cell: (r) => <Num title={`${r.what} with ${spec}`} text={`with over without = ${r.ratio ?? "unknown"}\nCheck: ${prediction.found.value.value?.command ?? "trimtab predict"} -t ${spec}`}>{change(r.ratio)}</Num> },
    ]} />
  );
}

/** Which other techniques it composes with on this model, tried one after the other. */
function Fellows({ spec }: { spec: string }) {
  const found = useSignal<Delta[] | null>(null);
  const error = useSignal("");
  const busy = useSignal(false);
  const ask = async () => {
    const c = current.value;
    if (!isCase(c)) return;
    const others = (techniques.found.value.value?.techniques ?? []).map((t) => t.name).filter((name) => name !== spec.split(":")[0]);
    busy.value = true;
    try {
      found.value = (await call("post", "/api/deltas", { ...c, techniques: [spec], candidates: others })).rows;
    } catch (caught) {
      error.value = refusal(caught).message;
    } finally {
      busy.value = false;
    }
  };
  return (
    <details onToggle={(e) => e.currentTarget.open && void ask()}>
      <summary>What it composes with on this model</summary>
      {error.value && <p class="error" role="alert">{error.value}</p>}
      {busy.value && <p class="busy">Trying every other technique on top.</p>}
      {found.value && <Table caption={`On top of ${spec}`} rows={found.value} columns={[
        { title: "technique", cell: (r) => <code>{r.technique}</code> },
        { title: "TPOT", number: true, cell: (r) => (r.refused ? "" : change(r.tpot)) },
        { title: "peak memory", number: true, cell: (r) => (r.refused ? "" : change(r.peak)) },
        { title: "composes", cell: (r) => r.refused || "yes" },
      ]} />}
    </details>
  );
}
