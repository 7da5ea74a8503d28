/** One generation: how far it is, its particles as they grow, its curves, and in the end what to take away. */
import { useEffect, useRef, useState } from "preact/hooks";
import { cancelGeneration, deleteGeneration, type Generation, hasEnded, Problem, retryGeneration } from "./api";
import { announce } from "./announce";
import { Compare } from "./compare";
import { Curves } from "./curves";
import { Download } from "./download";
import { date, fileName, percent, status } from "./format";
import { watch } from "./live";
import { ParticleCard } from "./particle";
import { Viewer } from "./viewer";

export function GenerationView({ id }: { id: string }) {
  const [generation, setGeneration] = useState<Generation | null>(null);
  const [problem, setProblem] = useState("");
  const [round, setRound] = useState(0); // it may be tried again, and is watched again then

  useEffect(() => {
    const stop = new AbortController();
    watch(id, setGeneration, stop.signal).catch((error: Error) => {
      if (!stop.signal.aborted) setProblem(error instanceof Problem ? error.detail : String(error));
    });
    return () => stop.abort();
  }, [id, round]);
  useEffect(() => {
    if (generation) document.title = `${generation.prompt} · raydream`;
  }, [generation?.prompt]);
  useAnnouncements(generation);

  return (
    <>
      <a class="back" href="#/">
        ← All models
      </a>
      <h1 tabIndex={-1}>{generation?.prompt ?? (problem ? "This cannot be shown" : "One moment…")}</h1>
      {problem && <p class="wrong">{problem}</p>}
      {generation && (
        <Loaded
          generation={generation}
          changed={setGeneration}
          again={(now) => (setGeneration(now), setRound(round + 1))}
        />
      )}
    </>
  );
}

interface LoadedProps {
  generation: Generation;
  changed: (now: Generation) => void;
  again: (now: Generation) => void;
}

function Loaded({ generation, changed, again }: LoadedProps) {
  const [turned, setTurned] = useState<number | null>(null);
  const [chosen, setChosen] = useState<number[]>([]);
  const [comparing, setComparing] = useState(false);
  const ended = hasEnded(generation);
  const filmed = generation.particles.filter((particle) => particle.turntable);
  const compared = chosen.length > 1 ? filmed.filter(({ index }) => chosen.includes(index)) : filmed;

  const choose = (index: number) =>
    setChosen(chosen.includes(index) ? chosen.filter((other) => other !== index) : [...chosen, index]);

  return (
    <>
      <Facts generation={generation} />
      <ProgressBar generation={generation} changed={changed} again={again} />
      {generation.error && (
        <p class="wrong">
          <strong>{generation.error.title}.</strong> {generation.error.detail}
        </p>
      )}
      <section aria-labelledby="particles">
        <div class="bar">
          <h2 id="particles">Particles</h2>
          {filmed.length > 1 && (
            <button type="button" onClick={() => setComparing(true)}>
              Compare {chosen.length > 1 ? `${compared.length} chosen` : "all"}
            </button>
          )}
          {ended && <TakeAway generation={generation} />}
        </div>
        <ul role="list" class="cards">
          {generation.particles.map((particle) => (
            <ParticleCard
              key={particle.index}
              generation={generation}
              particle={particle}
              chosen={chosen.includes(particle.index)}
              choose={() => choose(particle.index)}
              turn={() => setTurned(particle.index)}
            />
          ))}
        </ul>
      </section>
      <Curves url={generation.links.metrics} step={generation.progress.step} />
      {turned !== null && <Viewer generation={generation} first={turned} onClose={() => setTurned(null)} />}
      {comparing && <Compare particles={compared} onClose={() => setComparing(false)} />}
    </>
  );
}

function Facts({ generation }: { generation: Generation }) {
  const { n, preset, method, seed, created_at: created } = generation;
  return (
    <p class="hint facts">
      <span>
        {n} {n === 1 ? "particle" : "particles"}
      </span>
      <span>preset {preset}</span>
      <span>method {method}</span>
      <span>seed {seed}</span>
      <span>asked {date(created)}</span>
    </p>
  );
}

function ProgressBar({ generation, changed, again }: LoadedProps) {
  const [problem, setProblem] = useState("");
  const ended = hasEnded(generation);
  const phase = generation.progress.phase;
  const tells = generation.state === "running" || (generation.state === "queued" && phase !== "waiting");

  const failed = (error: Error) => setProblem(error.message);

  async function cancel() {
    if (!confirm("Stop this generation? What has grown so far stays as it is.")) return;
    await cancelGeneration(generation.id).then(changed, failed);
  }

  async function retry() {
    setProblem("");
    await retryGeneration(generation.id).then(again, failed);
  }

  async function remove() {
    if (!confirm(`Delete “${generation.prompt}” with all its models? This cannot be undone.`)) return;
    await deleteGeneration(generation.id).then(() => {
      announce(`${generation.prompt}: Deleted`);
      location.hash = "#/";
    }, failed);
  }

  return (
    <div class="progress" data-state={generation.state}>
      <span id="progress-words">
        {status(generation)}
        {tells && phase && <span class="hint"> · {phase}</span>}
      </span>
      {!ended && (
        <button type="button" onClick={cancel}>
          Cancel
        </button>
      )}
      {(generation.state === "failed" || generation.state === "cancelled") && (
        <button type="button" onClick={retry}>
          Try again
        </button>
      )}
      {ended && (
        <button type="button" onClick={remove}>
          Delete
        </button>
      )}
      {!ended && <progress max={100} value={percent(generation)} aria-labelledby="progress-words" />}
      {problem && (
        <p class="wrong" role="alert">
          {problem}
        </p>
      )}
    </div>
  );
}

function TakeAway({ generation }: { generation: Generation }) {
  const { links, prompt } = generation;
  return (
    <>
      {links.archive && (
        <Download url={links.archive} name={fileName(prompt, ".zip")}>
          Everything as zip
        </Download>
      )}
      {links.report && (
        <Download url={links.report} name={fileName(prompt, ".html")} opens>
          Report
        </Download>
      )}
    </>
  );
}

/** Says out loud how a generation changes state, and each quarter of its way; not each of its steps. */
function useAnnouncements(generation: Generation | null): void {
  const last = useRef("");
  const quarter = generation ? Math.floor(percent(generation) / 25) : 0;
  useEffect(() => {
    if (!generation) return;
    const words = generation.state === "running" ? `${25 * quarter} percent done` : status(generation);
    if (last.current && last.current !== words) announce(`${generation.prompt}: ${words}`);
    last.current = words;
  }, [generation?.state, quarter]);
}
