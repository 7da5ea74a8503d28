/** Words for people. */
import type { Generation } from "./api";

export function duration(seconds: number): string {
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60 ? `${s % 60} s` : ""}`.trim();
  return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
}

const when = new Intl.DateTimeFormat("en", { dateStyle: "medium", timeStyle: "short" });
export const date = (text: string): string => when.format(new Date(text));

/** What is going on, in one line. */
export function status(generation: Generation): string {
  const { state, progress, queue_position: place, started_at: from, ended_at: to } = generation;
  switch (state) {
    case "queued":
      return place === null ? "Waiting" : place <= 1 ? "Waiting, next in line" : `Waiting, ${place - 1} ahead`;
    case "running": {
      const left = progress.eta_s === null ? "" : ` · about ${duration(progress.eta_s)} left`;
      return progress.step ? `Step ${progress.step} of ${progress.num_steps}${left}` : `Starting${left}`;
    }
    case "finished":
      return from && to ? `Finished in ${duration((Date.parse(to) - Date.parse(from)) / 1000)}` : "Finished";
    case "failed":
      return "Failed";
    case "cancelled":
      return "Cancelled";
  }
}

export const percent = ({ progress, state }: Generation): number =>
  state === "finished" ? 100 : Math.floor((100 * progress.step) / Math.max(1, progress.num_steps));

/** Four significant digits at most, short enough for a chart's axis. */
export function number(value: number): string {
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(1) : String(Number(value.toPrecision(3)));
}

/** A name for a file that says what is in it. */
export function fileName(prompt: string, ending: string): string {
  const words = prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40).replace(/^-+|-+$/g, "");
  return `${words || "raydream"}${ending}`;
}
