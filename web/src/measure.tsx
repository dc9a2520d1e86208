/** "Measure here": start, watch and cancel a measurement on the machine that serves this page. */

import { signal } from "@preact/signals";
import { type Progress, call, prediction, refusal, runs } from "./api";
import { seconds } from "./format";
import { current, isCase, set, view } from "./state";
import { Command } from "./why";

export const progress = signal<Progress | null>(null);
const error = signal("");
let watching = false;

async function watch(): Promise<void> {
  if (watching) return;
  watching = true;
  try {
    do {
      progress.value = await call("get", "/api/measurement");
      if (progress.value.state === "running") await new Promise((done) => setTimeout(done, 700));
    } while (progress.value.state === "running");
    if (progress.value.state !== "idle") await runs.load();
  } catch (caught) {
    error.value = refusal(caught).message;
  } finally {
    watching = false;
  }
}

/** A measurement that another tab began is shown too. */
export const join = () => void (progress.value === null && !watching && watch());

async function start(): Promise<void> {
  const asked = current.value;
  if (!isCase(asked)) return;
  error.value = "";
  try {
    progress.value = await call("post", "/api/measurement", asked);
    if (view.value.screen !== "measured") set({ screen: "measured" });
    void watch();
  } catch (caught) {
    error.value = refusal(caught).message;
  }
}

async function cancel(): Promise<void> {
  try {
    progress.value = await call("delete", "/api/measurement");
  } catch (caught) {
    error.value = refusal(caught).message;
  }
}

export function MeasureButton() {
  const why = prediction.found.value.value?.measurable ?? "Nothing is priced yet.";
  const running = progress.value?.state === "running";
  return (
    <div>
      <p>
        <button type="button" onClick={() => void start()} disabled={Boolean(why) || running}>Measure here</button>{" "}
        {why ? `Not possible: ${why}` : "Runs this case, without and with its techniques, on the machine that serves this page."}
      </p>
      {error.value && <p class="error" role="alert">{error.value}</p>}
    </div>
  );
}

const WORDS: Record<string, string> = { running: "Measuring", done: "Measured", failed: "The measurement failed", cancelled: "Cancelled" };

export function ProgressPanel() {
  const now = progress.value;
  if (!now || now.state === "idle") return null;
  return (
    <div class="progress" role="status">
      <p>
        <b>{WORDS[now.state]}</b>, {seconds(now.elapsed_s)}
        {now.state === "running" && `: ${now.label}${now.total ? `, ${now.done} of ${now.total}` : ""}`}{" "}
        {now.state === "running" && <button type="button" onClick={() => void cancel()}>Cancel</button>}
      </p>
      {now.state === "running" && <progress aria-label={`${now.label} ${now.done} of ${now.total}`} max={now.total || 1} value={now.done} />}
      {now.error && <p class="error">{now.error}</p>}
      <Command text={now.command} />
    </div>
  );
}
