/** The bar above every screen: model, machine, workload, techniques. What is wrong with a field stands below it. */

import { useSignal } from "@preact/signals";
import type { ComponentChildren } from "preact";
import { key, keyWanted, machines, models, prediction, reached, refused, techniques } from "./api";
import { set, view } from "./state";

/** Fields of a refusal -> the field it stands below. */
const PLACES: Record<string, string> = { kv_dtype: "kv", usd_per_h: "price", continuous: "serving" };
const KNOWN = new Set(["model", "machine", "stack", "batch", "prompt", "gen", "tp", "pp", "dtype", "kv", "price", "techniques"]);

const placeOf = (param: string) => PLACES[param] ?? param;

function Field({ name, label, children }: { name: string; label: string; children: ComponentChildren }) {
  const error = refused();
  const mine = error && placeOf(error.param) === name ? error.message : "";
  return (
    <div class={`field ${name}`}>
      <label for={`f-${name}`}>{label}</label>
      {children}
      {mine && <p class="error" role="alert" id={`e-${name}`}>{mine}</p>}
    </div>
  );
}

const wrong = (name: string) => {
  const error = refused();
  return error && placeOf(error.param) === name ? { "aria-invalid": true, "aria-describedby": `e-${name}` } : {};
};

function TextField({ name, label, list, size, placeholder }: {
  name: "model" | "machine" | "batch" | "prompt" | "gen" | "tp" | "pp" | "price"; label: string; list?: string; size: number; placeholder?: string;
}) {
  const numeric = list === undefined;
  return (
    <Field name={name} label={label}>
      <input
        id={`f-${name}`} value={view.value[name]} size={size} list={list} autocomplete="off" spellcheck={false}
        inputMode={numeric ? "numeric" : "text"} placeholder={placeholder} {...wrong(name)}
        onInput={(event) => set({ [name]: event.currentTarget.value })}
      />
    </Field>
  );
}

function Choice({ name, label, options }: { name: "stack" | "dtype" | "kv"; label: string; options: [string, string][] }) {
  const now = view.value[name];
  const all = options.some(([value]) => value === now) ? options : [...options, [now, now] as [string, string]];
  return (
    <Field name={name} label={label}>
      <select id={`f-${name}`} value={now} {...wrong(name)} onChange={(event) => set({ [name]: event.currentTarget.value })}>
        {all.map(([value, text]) => <option key={value} value={value} selected={value === now}>{text}</option>)}
      </select>
    </Field>
  );
}

export const addTechnique = (text: string) => {
  const added = text.trim();
  if (added && !view.value.techniques.includes(added)) set({ techniques: [...view.value.techniques, added] });
};

function Chips() {
  const typed = useSignal("");
  return (
    <Field name="techniques" label="Techniques">
      <ul class="chips">
        {view.value.techniques.map((text) => (
          <li key={text}>
            <code>{text}</code>
            <button type="button" aria-label={`Remove ${text}`}
              onClick={() => set({ techniques: view.value.techniques.filter((each) => each !== text) })}>×</button>
          </li>
        ))}
      </ul>
      <form onSubmit={(event) => { event.preventDefault(); addTechnique(typed.value); typed.value = ""; }}>
        <input id="f-techniques" list="techniques" size={18} placeholder="kivi:bits=2" autocomplete="off" spellcheck={false}
          value={typed.value} {...wrong("techniques")} onInput={(event) => (typed.value = event.currentTarget.value)} />
        <button type="submit">Add</button>
      </form>
    </Field>
  );
}

const DTYPES: [string, string][] = ["float32", "bfloat16", "float16", "fp8", "mxfp4", "file"].map((d) => [d, d]);
const KV_DTYPES: [string, string][] = ["float32", "bfloat16", "float16", "fp8", "int8", "int4"].map((d) => [d, d]);

export function Bar() {
  for (const each of [models, machines, techniques]) each.once();
  const known = machines.found.value.value;
  const error = refused();
  const stacks: [string, string][] = [["", "best known"], ...(known?.stacks ?? []).map((s) => [s, s] as [string, string])];
  const paths = models.found.value.value?.paths;
  return (
    <section class="bar" aria-label="What is priced">
      <TextField name="model" label={paths ? "Model, folder or .gguf" : "Model"} list="models" size={22} />
      <TextField name="machine" label="Machine" list="machines" size={16} placeholder={known?.calibrated ? "this" : "a100"} />
      <TextField name="prompt" label="Prompt tokens" size={7} />
      <TextField name="gen" label="Generated" size={6} />
      <TextField name="batch" label={view.value.serving ? "Concurrency" : "Batch"} size={5} />
      <Chips />
      <details class="more" open={["stack", "dtype", "kv", "tp", "pp", "price"].includes(placeOf(error?.param ?? "")) || undefined}>
        <summary>More</summary>
        <div>
          <Choice name="stack" label="Stack" options={stacks} />
          <Choice name="dtype" label="Weights" options={DTYPES} />
          <Choice name="kv" label="Cache" options={KV_DTYPES} />
          <TextField name="tp" label="Tensor parallel" size={4} />
          <TextField name="pp" label="Pipeline stages" size={4} />
          <TextField name="price" label="USD per hour" size={6} placeholder="list" />
          <label class="check">
            <input type="checkbox" checked={view.value.serving} onChange={(e) => set({ serving: e.currentTarget.checked })} />
            continuous serving
          </label>
        </div>
      </details>
      <datalist id="models">{models.found.value.value?.models.map((m) => <option key={m.id} value={m.id}>{m.architecture}</option>)}</datalist>
      <datalist id="machines">{known?.machines.map((m) => <option key={m.id} value={m.aliases[0] ?? m.id}>{m.name}</option>)}</datalist>
      <datalist id="techniques">
        {techniques.found.value.value?.techniques.map((t) => <option key={t.name} value={t.name}>{t.summary}</option>)}
      </datalist>
      {error && !KNOWN.has(placeOf(error.param)) && !keyWanted.value && (
        <p class="error" role="alert">
          {error.message} {!reached.value && <button type="button" onClick={prediction.again}>Try again</button>}
        </p>
      )}
      {keyWanted.value && <KeyForm />}
    </section>
  );
}

function KeyForm() {
  const typed = useSignal("");
  return (
    <form class="error" onSubmit={(event) => {
      event.preventDefault();
      key.value = typed.value;
      sessionStorage.setItem("key", typed.value);
      prediction.again();
      for (const each of [models, machines, techniques]) void each.load();
    }}>
      <label for="f-key">This server asks for an API key; it is kept until the tab is closed.</label>
      <input id="f-key" type="password" autocomplete="off" value={typed.value} onInput={(e) => (typed.value = e.currentTarget.value)} />
      <button type="submit">Use</button>
    </form>
  );
}
