/** Numbers as text, the way the command line prints them: three significant digits and a unit. */

const three = (value: number): string => {
  const size = Math.abs(value);
  return size < 1 && size > 0 ? value.toPrecision(3) : value.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : 2);
};

const scaled = (value: number, steps: readonly (readonly [string, number])[], unit: string): string => {
  for (const [prefix, scale] of steps) if (Math.abs(value) >= scale) return `${three(value / scale)} ${prefix}${unit}`.trim();
  return `${three(value)} ${unit}`.trim();
};

const SI = [["P", 1e15], ["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]] as const;
const BINARY = [["Ti", 2 ** 40], ["Gi", 2 ** 30], ["Mi", 2 ** 20], ["Ki", 2 ** 10]] as const;

export const si = (value: number, unit = ""): string => value === 0 ? `0 ${unit}`.trim() : scaled(value, SI, unit);

export const bytes = (value: number): string =>
  Math.abs(value) < 1024 ? `${value.toFixed(0)} B` : scaled(value, BINARY, "B");

export const seconds = (value: number): string => {
  const size = Math.abs(value);
  if (size >= 1 || size === 0) return `${three(value)} s`;
  return size >= 1e-3 ? `${three(value * 1e3)} ms` : `${three(value * 1e6)} µs`;
};

export const percent = (share: number): string => `${(share * 100).toFixed(share < 0.1 ? 1 : 0)} %`;

export const whole = (value: number): string => value.toLocaleString("en-US");

/** A value by its unit; null is said, not hidden. */
export const shown = (value: number | null | undefined, unit: string): string => {
  if (value === null || value === undefined) return "unknown";
  if (unit === "s") return seconds(value);
  if (unit === "B") return bytes(value);
  if (unit === "USD/Mtoken") return `$${value < 0.1 ? value.toPrecision(2) : value.toFixed(2)}`;
  if (unit === "" || unit === "nats") return `${value.toPrecision(3)} ${unit}`.trim();
  return si(value, unit);
};

/** A ratio new over old as a change: "42 % less". */
export const change = (ratio: number | null | undefined): string => {
  if (ratio === null || ratio === undefined) return "unknown";
  const part = Math.abs(ratio - 1);
  if (part < 0.0005) return "same";
  return ratio < 1 ? `${percent(part)} less` : ratio < 2 ? `${percent(part)} more` : `${three(ratio)} times`;
};
