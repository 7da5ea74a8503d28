/** The order form: a prompt, how many, and what few people need under "More". */
import { useEffect, useRef, useState } from "preact/hooks";
import { type Choices, getChoices, type Order, postGeneration, Problem } from "./api";
import { hrefOf } from "./hooks";
import { Words } from "./words";

/** A key of 128 random bits; randomUUID is missing where the page is not served from a secure context. */
const newKey = (): string =>
  Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");

const newSeed = (): number => crypto.getRandomValues(new Uint16Array(1))[0]!;

function orderOf(form: FormData): Order {
  const text = (name: string) => String(form.get(name) ?? "").trim();
  const order: Order = {
    prompt: text("prompt"),
    n: Number(text("n")),
    preset: text("preset"),
    method: text("method") || undefined,
    seed: text("seed") ? Number(text("seed")) : newSeed(),
  };
  return text("steps") ? { ...order, steps: Number(text("steps")) } : order;
}

export function Composer() {
  const [choices, setChoices] = useState<Choices | null>(null);
  const [preset, setPreset] = useState("");
  const [prompt, setPrompt] = useState("");
  const [sending, setSending] = useState(false);
  const [problem, setProblem] = useState<Problem | null>(null);
  const key = useRef(newKey());
  const form = useRef<HTMLFormElement>(null);
  const prior = choices?.items.find((each) => each.name === preset);

  useEffect(() => {
    getChoices().then(
      (found) => (setChoices(found), setPreset((found.items.find((item) => item.default) ?? found.items[0])?.name ?? "")),
      (error: Error) => setProblem(new Problem(0, error.message, null)),
    );
  }, []);
  useEffect(() => {
    if (problem?.field) form.current?.querySelector<HTMLElement>(`[name="${CSS.escape(problem.field)}"]`)?.focus();
  }, [problem]);

  async function submit(event: SubmitEvent) {
    event.preventDefault();
    setSending(true);
    setProblem(null);
    try {
      const made = await postGeneration(orderOf(new FormData(form.current!)), key.current);
      location.hash = hrefOf(made.id);
    } catch (error) {
      if (error instanceof Problem) key.current = newKey(); // refused, so a corrected order is a new one
      setProblem(error instanceof Problem ? error : new Problem(0, "The service does not answer. Try again.", null));
    } finally {
      setSending(false);
    }
  }

  const wrong = (field: string) =>
    problem?.field === field ? { "aria-invalid": true as const, "aria-describedby": "problem" } : {};

  return (
    <section class="composer" aria-labelledby="ask">
      <h1 id="ask" tabIndex={-1}>
        What shall we make?
      </h1>
      <p class="lead">Describe one object. Several versions of it grow side by side, each its own.</p>
      <form ref={form} onSubmit={submit} onInput={() => (key.current = newKey())}>
        <div class="ask">
          <label class="unseen" for="prompt">
            Prompt
          </label>
          <input
            id="prompt"
            name="prompt"
            required
            maxLength={choices?.limits.prompt_characters}
            autocomplete="off"
            enterkeyhint="go"
            placeholder={prior?.words?.length ? `a ${prior.words[0]}` : "a red chair"}
            value={prompt}
            onInput={(event) => setPrompt(event.currentTarget.value)}
            {...wrong("prompt")}
          />
          <button type="submit" class="primary" disabled={sending}>
            {sending ? "Sending…" : "Create"}
          </button>
        </div>
        <Words words={prior?.words ?? null} prompt={prompt} setPrompt={setPrompt} />
        <div class="fields">
          <div class="field narrow">
            <label for="n">How many</label>
            <input id="n" name="n" type="number" min={1} max={choices?.limits.n} defaultValue="4" required {...wrong("n")} />
          </div>
          <div class="field">
            <label for="preset">Preset</label>
            <select
              id="preset"
              name="preset"
              value={preset}
              onChange={(event) => setPreset(event.currentTarget.value)}
              {...wrong("preset")}
            >
              {choices?.items.map(({ name }) => (
                <option key={name}>{name}</option>
              ))}
            </select>
          </div>
          {prior && <p class="hint about">{prior.description}</p>}
        </div>
        <More wrong={wrong} methods={choices?.methods} usualSteps={prior?.default_steps} maxSteps={choices?.limits.steps} open={["method", "seed", "steps"].includes(problem?.field ?? "")} />
        <p id="problem" class="wrong" role="alert">
          {problem && `${problem.field && !problem.detail.startsWith(problem.field) ? `${problem.field}: ` : ""}${problem.detail}`}
        </p>
      </form>
    </section>
  );
}

interface MoreProps {
  wrong: (field: string) => object;
  usualSteps: number | undefined;
  maxSteps: number | undefined;
  methods: Choices["methods"] | undefined;
  open: boolean;
}

function More({ wrong, methods, usualSteps, maxSteps, open }: MoreProps) {
  return (
    <details open={open}>
      <summary>More</summary>
      <div class="fields">
        <div class="field">
          <label for="method">Method</label>
          <select id="method" name="method" {...wrong("method")}>
            {methods?.map(({ name, description }) => (
              <option key={name} value={name}>
                {description}
              </option>
            ))}
          </select>
        </div>
        <div class="field narrow">
          <label for="seed">Seed</label>
          <input id="seed" name="seed" type="number" min={0} step={1} placeholder="any" {...wrong("seed")} />
        </div>
        <div class="field narrow">
          <label for="steps">Steps</label>
          <input
            id="steps"
            name="steps"
            type="number"
            min={1}
            max={maxSteps}
            step={1}
            placeholder={usualSteps?.toString()}
            {...wrong("steps")}
          />
        </div>
        <p class="hint about">The same seed and settings make the same models again. More steps take longer.</p>
      </div>
    </details>
  );
}
