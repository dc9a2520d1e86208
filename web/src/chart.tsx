/** A plot and its table twin. */

import * as Plot from "@observablehq/plot";
import type { ComponentChildren } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";

export interface Column<T> {
  title: string;
  cell: (row: T) => ComponentChildren;
  number?: boolean;
}

export function Table<T>({ caption, columns, rows, rowKey, selected, dim }: {
  caption: string; columns: Column<T>[]; rows: readonly T[]; rowKey?: (row: T) => string; selected?: string;
  dim?: (row: T) => boolean;
}) {
  return (
    <div class="scroll" tabIndex={0} role="region" aria-label={caption}>
      <table>
        <caption>{caption}</caption>
        <thead>
          <tr>{columns.map((c) => <th key={c.title} scope="col" class={c.number ? "r" : ""}>{c.title}</th>)}</tr>
        </thead>
        <tbody>
          {rows.map((row, index) => {
            const key = rowKey ? rowKey(row) : String(index);
            return (
              <tr key={key} data-row={rowKey ? key : undefined} aria-selected={selected === undefined ? undefined : selected === key}
                class={dim?.(row) ? "dim" : ""}>
                {columns.map((c) => <td key={c.title} class={c.number ? "r" : ""}>{c.cell(row)}</td>)}
              </tr>
            );
          })}
        </tbody>
      </table>
    </div>
  );
}

type Built = (SVGSVGElement | HTMLElement) & Plot.Plot;

/** Draw what `options` say whenever `on` changes; `ready` may add events to the finished drawing. */
export function Chart({ title, options, on, children, ready, height = 340 }: {
  title: string; options: (width: number) => Plot.PlotOptions; on: unknown[]; children: ComponentChildren;
  ready?: (plot: Built) => void; height?: number;
}) {
  const place = useRef<HTMLDivElement>(null);
  const [width, setWidth] = useState(0);
  useEffect(() => {
    const watch = new ResizeObserver(([entry]) => entry && setWidth(Math.floor(entry.contentRect.width)));
    if (place.current) watch.observe(place.current);
    return () => watch.disconnect();
  }, []);
  useEffect(() => {
    if (!place.current || width < 40) return;
    const plot = Plot.plot({ width, height, marginLeft: 64, style: { background: "none", overflow: "visible" }, ...options(width) });
    // Plot labels its groups with names of marks, which say nothing; labelled dots become images that do.
    for (const group of plot.querySelectorAll("g[aria-label]")) group.removeAttribute("aria-label");
    for (const dot of plot.querySelectorAll("circle[aria-label]")) dot.setAttribute("role", "img");
    plot.setAttribute("role", "group");
    plot.setAttribute("aria-label", title);
    place.current.replaceChildren(plot);
    ready?.(plot as Built);
  }, [width, height, title, ...on]);
  return (
    <figure class="chart">
      <figcaption>{title}</figcaption>
      <div ref={place} class="plot" style={{ minHeight: `${height}px` }} />
      <details>
        <summary>The same as a table</summary>
        {children}
      </details>
    </figure>
  );
}

/** Points of a mark in the order of its data, each with the datum's index. */
export function points(plot: Element, mark: string): { index: number; element: SVGElement }[] {
  return [...plot.querySelectorAll<SVGElement>(`.${mark} circle, circle.${mark}`)].map((element) => ({
    index: (element as unknown as { __data__: number }).__data__,
    element,
  }));
}
