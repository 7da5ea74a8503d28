/** One particle in the grid: what it looks like by now, and what can be done with it. */
import type { Generation, Particle } from "./api";
import { hasEnded } from "./api";
import { Download } from "./download";
import { fileName } from "./format";
import { useObjectUrl } from "./hooks";

interface Props {
  generation: Generation;
  particle: Particle;
  chosen: boolean;
  choose: () => void;
  turn: () => void;
}

export function ParticleCard({ generation, particle, chosen, choose, turn }: Props) {
  const { index, preview, mesh, turntable } = particle;
  const image = useObjectUrl(preview, `${generation.preview_step} ${generation.state}`);
  const name = `particle ${index}`;
  const step = generation.preview_step === null || hasEnded(generation) ? "" : ` at step ${generation.preview_step}`;

  return (
    <li class={chosen ? "card chosen" : "card"}>
      <div class={image || hasEnded(generation) ? "tile" : "tile mist"} onClick={mesh ? turn : undefined}>
        {image && <img src={image} alt={`${generation.prompt}, ${name}${step}`} />}
      </div>
      <div class="does">
        <h3>Particle {index}</h3>
        {turntable && (
          <label class="check">
            <input type="checkbox" checked={chosen} onChange={choose} />
            Compare<span class="unseen"> {name}</span>
          </label>
        )}
        {mesh && (
          <button type="button" aria-label={`Turn in 3D: ${name}`} onClick={turn}>
            Turn in 3D
          </button>
        )}
        {mesh && (
          <Download url={mesh} name={fileName(generation.prompt, `-${index}.glb`)} label={`GLB: ${name}`}>
            GLB
          </Download>
        )}
      </div>
    </li>
  );
}
