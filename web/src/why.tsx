/** The "why" of a number: formula, inputs, sources, band and the command that checks it. */

import { signal } from "@preact/signals";
import type { ComponentChildren } from "preact";
import { useEffect, useRef } from "preact/hooks";
import { call, refusal } from "./api";
import { current, isCase } from "./state";

interface Told {
  title: string;
  text: string;
  command: string;
}

const told = signal<Told | null>(null);
let opener: HTMLElement | null = null;
let newest = 0;

/** Say where a number comes from: a text at hand, or the name of a count or figure that the server explains. */
export async function explain(title: string, from: { text: string; command?: string } | { name: string }): Promise<void> {
  opener = document.activeElement as HTMLElement | null;
  const mine = ++newest;
  if ("text" in from) {
    told.value = { title, text: from.text, command: from.command ?? "" };
    return;
  }
  const asked = current.value;
  if (!isCase(asked)) return;
  told.value = { title, text: "Asking the server.", command: "" };
  try {
    const found = await call("post", "/api/explain", { ...asked, name: from.name });
    if (mine === newest) told.value = { title, ...found };
  } catch (error) {
    if (mine === newest) told.value = { title, text: refusal(error).message, command: "" };
  }
}

export const closeWhy = (): boolean => {
  if (!told.value) return false;
  newest++;
  told.value = null;
  opener?.focus();
  return true;
};

export function WhyPanel() {
  const panel = useRef<HTMLDivElement>(null);
  const found = told.value;
  useEffect(() => void (found && panel.current?.focus()), [found?.title]);
  if (!found) return null;
  return (
    <div class="why" role="dialog" aria-label={`Why: ${found.title}`} tabIndex={-1} ref={panel}>
      <header>
        <h2>{found.title}</h2>
        <button type="button" onClick={closeWhy}>Close</button>
      </header>
      <pre tabIndex={0}>{found.text}</pre>
      {found.command && <Command text={found.command} />}
    </div>
  );
}

/** A number that says where it comes from when asked. */
export function Num({ title, children, name, text }: { title: string; children: ComponentChildren; name?: string; text?: string }) {
  const from = name ? { name } : { text: text ?? "" };
  return (
    <button type="button" class="num" title={`Why: ${title}`} onClick={() => void explain(title, from)}>
      {children}
    </button>
  );
}

/** A command line that can be copied. */
export function Command({ text }: { text: string }) {
  return (
    <p class="command">
      <code tabIndex={0}>{text}</code>
      <button type="button" onClick={() => void navigator.clipboard?.writeText(text)} aria-label={`Copy: ${text}`}>Copy</button>
    </p>
  );
}

/** What to do where there is nothing to show. */
export function Empty({ children, command }: { children: ComponentChildren; command?: string }) {
  return (
    <div class="empty">
      <p>{children}</p>
      {command && <Command text={command} />}
    </div>
  );
}
