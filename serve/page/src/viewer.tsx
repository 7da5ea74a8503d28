/** A finished model to turn: by mouse, by finger, by keys, by buttons. */
import type { ComponentChildren } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { type Generation, getBlob } from "./api";
import { Download } from "./download";
import { fileName } from "./format";
import { prefersStillness, useModal, useObjectUrl } from "./hooks";
import type { Stage } from "./stage";

const TURN_RAD = Math.PI / 12;
const ZOOM = 1.2;

interface Props {
  generation: Generation;
  first: number;
  onClose: () => void;
}

export function Viewer({ generation, first, onClose }: Props) {
  const dialog = useModal(onClose);
  const [index, setIndex] = useState(first);
  const models = generation.particles.filter((particle) => particle.mesh);
  const place = models.findIndex((particle) => particle.index === index);
  const particle = models[place]!;
  const next = (by: number) => setIndex(models[(place + by + models.length) % models.length]!.index);

  return (
    <dialog ref={dialog} class="wide" aria-labelledby="viewer-title">
      <div class="bar">
        <h2 id="viewer-title">
          {generation.prompt} <span class="hint">particle {index}</span>
        </h2>
        {models.length > 1 && (
          <>
            <button type="button" aria-label="Previous particle" onClick={() => next(-1)}>
              ‹
            </button>
            <button type="button" aria-label="Next particle" onClick={() => next(1)}>
              ›
            </button>
          </>
        )}
        <button type="button" onClick={() => dialog.current?.close()}>
          Close
        </button>
      </div>
      <Model key={index} url={particle.mesh!} film={particle.turntable} name={`${generation.prompt}, particle ${index}`}>
        <Download url={particle.mesh!} name={fileName(generation.prompt, `-${index}.glb`)}>
          GLB
        </Download>
      </Model>
    </dialog>
  );
}

interface ModelProps {
  url: string;
  film: string | null;
  name: string;
  children: ComponentChildren;
}

function Model({ url, film, name, children }: ModelProps) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const stage = useRef<Stage | null>(null);
  const [words, setWords] = useState("Loading…");
  const [failed, setFailed] = useState(false);
  const [spinning, setSpinning] = useState(!prefersStillness());

  useEffect(() => {
    const stop = new AbortController();
    async function open() {
      const [{ openStage }, blob] = await Promise.all([import("./stage"), getBlob(url, stop.signal)]);
      const opened = await openStage(canvas.current!, await blob.arrayBuffer());
      if (stop.signal.aborted) return opened.close();
      stage.current = opened;
      opened.spin(spinning);
      setWords(`${opened.numTriangles.toLocaleString("en")} triangles`);
    }
    open().catch((error: Error) => {
      if (stop.signal.aborted) return;
      setFailed(true);
      setWords(`The model cannot be shown here: ${error.message}`);
    });
    return () => (stop.abort(), stage.current?.close());
  }, []);
  useEffect(() => stage.current?.spin(spinning), [spinning]);

  const keys: Record<string, () => void> = {
    ArrowLeft: () => stage.current?.turn(-TURN_RAD, 0),
    ArrowRight: () => stage.current?.turn(TURN_RAD, 0),
    ArrowUp: () => stage.current?.turn(0, -TURN_RAD),
    ArrowDown: () => stage.current?.turn(0, TURN_RAD),
    "+": () => stage.current?.zoom(ZOOM),
    "-": () => stage.current?.zoom(1 / ZOOM),
    "0": () => stage.current?.reset(),
  };
  function press(event: KeyboardEvent) {
    const act = keys[event.key === "=" ? "+" : event.key];
    if (act && !event.ctrlKey && !event.metaKey) (event.preventDefault(), setSpinning(false), act());
  }

  return (
    <>
      {failed ? (
        <Film url={film} name={name} />
      ) : (
        <canvas
          ref={canvas}
          class="stage"
          tabIndex={0}
          role="application"
          aria-label={`3D model of ${name}`}
          aria-describedby="viewer-keys"
          onKeyDown={press}
          onPointerDown={() => setSpinning(false)}
        />
      )}
      <div class="bar">
        <p class={failed ? "wrong" : "hint"} role="status">
          {words}
        </p>
        <p id="viewer-keys" class="hint keys">
          Drag or arrow keys turn, + and − zoom, 0 resets
        </p>
        <button type="button" aria-pressed={spinning} onClick={() => setSpinning(!spinning)}>
          Spin
        </button>
        <button type="button" aria-label="Zoom out" onClick={keys["-"]}>
          −
        </button>
        <button type="button" aria-label="Zoom in" onClick={keys["+"]}>
          +
        </button>
        <button type="button" onClick={keys["0"]}>
          Reset
        </button>
        {children}
      </div>
    </>
  );
}

/** Where the browser draws no 3D, or the file is broken. */
function Film({ url, name }: { url: string | null; name: string }) {
  const source = useObjectUrl(url);
  if (!source) return null;
  return <video class="stage" src={source} controls loop muted playsInline aria-label={`Turntable of ${name}`} />;
}
