/** Asks for the API key, where the service wants one. It stays in this tab's session storage. */
import { useModal } from "./hooks";

export interface KeyQuestion {
  refused: boolean;
  answer: (key: string) => void;
}

export function KeyDialog({ refused, answered }: { refused: boolean; answered: (key: string) => void }) {
  const dialog = useModal(() => dialog.current?.showModal()); // without a key there is nothing behind it to see

  function submit(event: SubmitEvent) {
    event.preventDefault();
    const key = String(new FormData(event.currentTarget as HTMLFormElement).get("key")).trim();
    if (key) answered(key);
  }

  return (
    <dialog ref={dialog} class="key" aria-labelledby="key-title">
      <form onSubmit={submit}>
        <h2 id="key-title">This service asks for a key</h2>
        <label for="key">API key</label>
        <input
          id="key"
          name="key"
          type="password"
          autocomplete="off"
          required
          aria-describedby="key-hint"
          aria-invalid={refused || undefined}
        />
        <p id="key-hint" class={refused ? "wrong" : "hint"}>
          {refused ? "The service does not know this key. " : ""}It is kept until you close this tab.
        </p>
        <button type="submit" class="primary">
          Continue
        </button>
      </form>
    </dialog>
  );
}
