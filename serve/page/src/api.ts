/** The service's HTTP interface: types of its answers, and one way to ask. */

export type State = "queued" | "running" | "finished" | "failed" | "cancelled";

export interface Particle {
  index: number;
  preview: string | null;
  turntable: string | null;
  mesh: string | null;
}

export interface Progress {
  step: number;
  num_steps: number;
  eta_s: number | null;
  phase: string;
  losses: Record<string, number>;
}

export interface Generation {
  id: string;
  prompt: string;
  n: number;
  preset: string;
  method?: string;
  seed: number;
  steps: number | null;
  state: State;
  queue_position: number | null;
  created_at: string;
  started_at: string | null;
  ended_at: string | null;
  progress: Progress;
  error: { title: string; detail: string } | null;
  preview_step: number | null;
  particles: Particle[];
  links: { self: string; events: string; archive: string | null; report: string | null; metrics: string };
}

export interface Prior {
  name: string;
  description: string;
  words: string[] | null;
  default: boolean;
  default_steps: number;
}

/** What may be ordered: presets with their priors, and the greatest values that the service takes. */
export interface Choices {
  items: Prior[];
  methods: { name: string; description: string }[];
  limits: { n: number; steps: number; prompt_characters: number };
}

export interface Order {
  prompt: string;
  n: number;
  preset: string;
  method?: string;
  seed: number;
  steps?: number;
}

export type MetricsRow = { step: number } & Record<string, number | null>;

/** What the service refused, in its own words; `field` names the input at fault. */
export class Problem extends Error {
  constructor(
    readonly status: number,
    readonly detail: string,
    readonly field: string | null,
  ) {
    super(detail);
  }
}

export const hasEnded = (generation: Generation): boolean => !["queued", "running"].includes(generation.state);

const KEY = "raydream-key";
let askForKey: (refused: boolean) => Promise<string> = () => Promise.reject(new Problem(401, "An API key is needed.", null));
let answer: Promise<string> | null = null;

/** The page says how to ask a person for the API key; several requests that need it wait for one answer. */
export function onKeyNeeded(ask: (refused: boolean) => Promise<string>): void {
  askForKey = ask;
}

export const hasKey = (): boolean => sessionStorage.getItem(KEY) !== null;

/** Answers of 401 are asked again with the key that the person gives; any other refusal is thrown as a `Problem`. */
export async function request(url: string, init: RequestInit = {}): Promise<Response> {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = new Headers(init.headers);
    if (key !== null) headers.set("Authorization", `Bearer ${key}`);
    const response = await fetch(url, { ...init, headers });
    if (response.ok) return response;
    if (response.status !== 401) throw await problemOf(response);
    if (key === sessionStorage.getItem(KEY)) {
      answer ??= askForKey(key !== null).finally(() => (answer = null));
      sessionStorage.setItem(KEY, await answer);
    }
  }
}

async function problemOf(response: Response): Promise<Problem> {
  const said = await response.json().catch(() => ({}));
  const detail = said.detail ?? said.title ?? `The service answered ${response.status}.`;
  return new Problem(response.status, String(detail), said.field ?? null);
}

async function json<T>(url: string, init?: RequestInit): Promise<T> {
  return (await request(url, init)).json() as Promise<T>;
}

const at = (id: string): string => `/v1/generations/${encodeURIComponent(id)}`;

export const getChoices = (): Promise<Choices> => json("/v1/priors");

export function getGenerations(cursor: string | null): Promise<{ items: Generation[]; next_cursor: string | null }> {
  return json(`/v1/generations?limit=12${cursor === null ? "" : `&cursor=${encodeURIComponent(cursor)}`}`);
}

export const getGeneration = (id: string, signal?: AbortSignal): Promise<Generation> => json(at(id), { signal });

/** `idempotencyKey`: the same order sent twice, after a broken connection, is made once. */
export function postGeneration(order: Order, idempotencyKey: string): Promise<Generation> {
  const headers = { "Content-Type": "application/json", "Idempotency-Key": idempotencyKey };
  return json("/v1/generations", { method: "POST", body: JSON.stringify(order), headers });
}

/** What has ended meanwhile stays as it is. */
export const cancelGeneration = (id: string): Promise<Generation> => json(`${at(id)}/cancel`, { method: "POST" });

export const retryGeneration = (id: string): Promise<Generation> => json(`${at(id)}/retry`, { method: "POST" });

/** For good, with all its files; only for what has ended. */
export async function deleteGeneration(id: string): Promise<void> {
  await request(at(id), { method: "DELETE" });
}

export async function getMetrics(url: string, afterStep: number, signal: AbortSignal): Promise<MetricsRow[]> {
  return (await json<{ rows: MetricsRow[] }>(`${url}?after=${afterStep}`, { signal })).rows;
}

/** Revalidated each time, for a preview changes under the same address. */
export async function getBlob(url: string, signal?: AbortSignal): Promise<Blob> {
  return (await request(url, { signal, cache: "no-cache" })).blob();
}
