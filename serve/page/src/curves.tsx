/** Losses by step: a faint line of what was measured, a strong one of its running mean. */
import { useEffect, useRef, useState } from "preact/hooks";
import { getMetrics, type MetricsRow } from "./api";
import { number } from "./format";

const WIDTH = 300;
const HEIGHT = 90;
const MAX_ROWS = 1000;
const PAUSE_S = 2;

export function Curves({ url, step }: { url: string; step: number }) {
  const rows = useRows(url, step);
  const names = [...new Set(rows.flatMap((row) => Object.keys(row)))].filter((name) => name !== "step");
  if (!names.length) return null;
  return (
    <section aria-labelledby="curves">
      <h2 id="curves">Curves</h2>
      <ul role="list" class="charts">
        {names.map((name) => (
          <li key={name}>
            <Chart name={name} points={rows.map((row) => [row.step, row[name] ?? NaN])} />
          </li>
        ))}
      </ul>
    </section>
  );
}

/** All rows so far, asked for piece by piece as the step advances; every second one is dropped where they are many. */
function useRows(url: string, step: number): MetricsRow[] {
  const [rows, setRows] = useState<MetricsRow[]>([]);
  const newest = useRef(step);
  newest.current = step;

  useEffect(() => {
    const stop = new AbortController();
    let [asked, last, busy] = [-1, -1, false];
    async function look() {
      if (busy || asked === newest.current) return;
      busy = true;
      try {
        const goal = newest.current;
        const more = await getMetrics(url, last, stop.signal);
        last = more.at(-1)?.step ?? last;
        if (more.length) setRows((old) => thin([...old, ...more]));
        asked = goal;
      } catch {
        // the next round asks again
      } finally {
        busy = false;
      }
    }
    void look();
    const timer = setInterval(look, PAUSE_S * 1000);
    return () => (clearInterval(timer), stop.abort());
  }, [url]);
  return rows;
}

const thin = (rows: MetricsRow[]): MetricsRow[] =>
  rows.length > MAX_ROWS ? rows.filter((_, i) => i % 2 === 0 || i === rows.length - 1) : rows;

function Chart({ name, points }: { name: string; points: [number, number][] }) {
  const finite = points.filter(([, value]) => Number.isFinite(value));
  if (!finite.length) return null;
  const mean = smooth(finite);
  const values = finite.map(([, value]) => value);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const [from, to] = [finite[0]![0], finite.at(-1)![0]];
  const path = (line: [number, number][]) =>
    line
      .map(([step, value], i) => {
        const x = (WIDTH * (step - from)) / Math.max(1, to - from);
        const y = HEIGHT - (HEIGHT * (value - low)) / (high - low || 1);
        return `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`;
      })
      .join("");
  const words = `${name}: running mean ${number(mean.at(-1)![1])} at step ${to}; all between ${number(low)} and ${number(high)}`;

  return (
    <figure class="chart">
      <figcaption>
        {name} <strong>{number(mean.at(-1)![1])}</strong>
      </figcaption>
      <svg viewBox={`0 -4 ${WIDTH} ${HEIGHT + 8}`} preserveAspectRatio="none" role="img" aria-label={words}>
        <path class="raw" d={path(finite)} />
        <path class="mean" d={path(mean)} />
      </svg>
      <p class="hint" aria-hidden="true">
        <span>step {from}</span>
        <span>
          {number(low)} to {number(high)}
        </span>
        <span>{to}</span>
      </p>
    </figure>
  );
}

/** Mean over a window of a twentieth of the points, no wider than what lies behind. */
function smooth(points: [number, number][]): [number, number][] {
  const width = Math.max(1, Math.round(points.length / 20));
  let sum = 0;
  return points.map(([step, value], i) => {
    sum += value - (i >= width ? points[i - width]![1] : 0);
    return [step, sum / Math.min(i + 1, width)];
  });
}
