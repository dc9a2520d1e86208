/** Calls of the server, typed by its own document, and the answers that screens share. */

import { effect, signal } from "@preact/signals";
import type { components, paths } from "./schema";
import { type Case, type Refusal, current, isCase } from "./state";

type Schemas = components["schemas"];
export type Predict = Schemas["PredictReply"];
export type Report = Schemas["ReportReply"];
export type Op = Schemas["OpReply"];
export type Figure = Schemas["FigureReply"];
export type Delta = Schemas["Delta"];
export type Paper = Schemas["PaperRow"];
export type Technique = Schemas["TechniqueRow"];
export type Run = Schemas["RunRow"];
export type Sweep = Schemas["SweepReply"];
export type Progress = Schemas["Progress"];
export type Compat = Schemas["CompatReply"];
export type Candidate = Schemas["Found"];

type Method = "get" | "post" | "delete";
type Operation<P extends keyof paths, M extends Method> = NonNullable<paths[P][M]>;
type Reply<O> = O extends { responses: { 200: { content: { "application/json": infer R } } } } ? R : never;
type Body<O> = O extends { requestBody: { content: { "application/json": infer B } } } ? B : undefined;

/** What a server that asks for keys was shown; gone with the tab. */
export const key = signal(sessionStorage.getItem("key") ?? "");
export const keyWanted = signal(false);
/** Whether the last call reached the server. */
export const reached = signal(true);

export class Failed extends Error {
  constructor(
    readonly status: number,
    message: string,
    readonly param: string,
  ) {
    super(message);
  }
}

export async function call<P extends keyof paths, M extends Method>(
  method: M, path: P, body?: Body<Operation<P, M>>, abort?: AbortSignal,
): Promise<Reply<Operation<P, M>>> {
  const headers: Record<string, string> = {};
  if (body !== undefined) headers["content-type"] = "application/json";
  if (key.value) headers["authorization"] = `Bearer ${key.value}`;
  let answer: Response;
  try {
    answer = await fetch(path, {
      method: method.toUpperCase(), headers, ...(body === undefined ? {} : { body: JSON.stringify(body) }),
      ...(abort ? { signal: abort } : {}),
    });
  } catch (error) {
    if (abort?.aborted) throw error;
    reached.value = false;
    throw new Failed(0, "The server does not answer. Start it again: trimtab ui. What you entered is kept, in the address too.", "");
  }
  reached.value = true;
  if (answer.ok) {
    if (keyWanted.value) keyWanted.value = false;
    return (await answer.json()) as Reply<Operation<P, M>>;
  }
  const told = (await answer.json().catch(() => null)) as Schemas["ErrorReply"] | null;
  if (answer.status === 401) keyWanted.value = true;
  throw new Failed(answer.status, told?.error.message ?? `The server answered ${answer.status}.`, told?.error.param ?? "");
}

export interface Shared<T> {
  value: T | null;
  error: Refusal | null;
  busy: boolean;
}

const empty = { value: null, error: null, busy: false };
export const refusal = (error: unknown): Refusal =>
  error instanceof Failed ? { param: error.param, message: error.message } : { param: "", message: String(error) };

/** A catalogue, asked for when first read. */
function catalogue<T>(ask: () => Promise<T>) {
  const found = signal<Shared<T>>(empty);
  const load = async () => {
    found.value = { ...found.value, busy: true };
    try {
      found.value = { value: await ask(), error: null, busy: false };
    } catch (error) {
      found.value = { ...found.value, error: refusal(error), busy: false };
    }
  };
  return { found, load, once: () => void (found.value.value || found.value.busy || found.value.error || load()) };
}

export const models = catalogue(() => call("get", "/api/models"));
export const machines = catalogue(() => call("get", "/api/machines"));
export const techniques = catalogue(() => call("get", "/api/techniques"));
export const papers = catalogue(() => call("get", "/api/papers"));
export const runs = catalogue(() => call("get", "/api/runs"));

/** Asks again what failed. */
const failing: (() => void)[] = [];

/** Keeps an answer beside a question that changes: the newest question wins, the last good answer stays in sight. */
export function follow<Q, A>(question: () => Q | null, ask: (asked: Q, abort: AbortSignal, part: (value: A) => void) => Promise<A>) {
  const found = signal<Shared<A>>({ ...empty });
  const tries = signal(0);
  let abort: AbortController | null = null;
  effect(() => {
    void tries.value;
    const asked = question();
    abort?.abort();
    abort = null;
    if (asked === null) return;
    const mine = (abort = new AbortController());
    found.value = { ...found.peek(), busy: true };
    const part = (value: A) => void (mine.signal.aborted || (found.value = { value, error: null, busy: true }));
    ask(asked, mine.signal, part).then(
      (value) => mine.signal.aborted || (found.value = { value, error: null, busy: false }),
      (error) => mine.signal.aborted || (found.value = { ...found.peek(), error: refusal(error), busy: false }),
    );
  });
  const again = () => void tries.value++;
  failing.push(() => found.peek().error && again());
  return { found, again };
}

const asked = () => (isCase(current.value) ? current.value : null);
export const prediction = follow<Case, Predict>(asked, (c, abort) => call("post", "/api/predict", c, abort));

/** A server that went away is asked again until it is back; then so is all that failed meanwhile. */
setInterval(() => reached.value || prediction.again(), 2000);
let before = true;
effect(() => {
  const back = reached.value && !before;
  before = reached.value;
  if (!back) return;
  for (const ask of failing) ask();
  for (const each of [models, machines, techniques, papers, runs]) if (each.found.peek().error) void each.load();
});

/** What is wrong with the fields, by field; "" for what belongs to none. */
export const refused = (): Refusal | null => (isCase(current.value) ? prediction.found.value.error : current.value);
