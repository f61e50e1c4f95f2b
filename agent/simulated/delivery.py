"""What of a request's answers exists, and what of it has been sent.

Not here: writing it (openai_api), and its shape (answers).
"""

from __future__ import annotations

from collections.abc import Iterator

from agent.simulated.answers import Piece, RunningUsage, Usage
from agent.simulated.scheduler import Phase, Sequence
from agent.simulated.tokens import decode


class Delivery:
    """The sequences of one request: `choices` for each prompt, in the order of the prompts.

    `echo`: each answer begins with its prompt.
    """

    def __init__(self, sequences: list[Sequence], choices: int, echo: bool) -> None:
        self.sequences = sequences
        self._firsts = sequences[::choices]  # one a prompt
        self._echo = echo
        self._sent = [0] * len(sequences)

    @property
    def sent_all(self) -> bool:
        return all(
            sent == len(sequence.output.tokens)
            for sent, sequence in zip(self._sent, self.sequences, strict=True)
        )

    @property
    def aborted(self) -> bool:
        return any(sequence.phase is Phase.ABORTED for sequence in self.sequences)

    def usage(self, completion_tokens: int | None = None) -> Usage:
        """Of all that was generated, or up to `completion_tokens`. A prompt counts once, whatever
        the number of choices.
        """
        if completion_tokens is None:
            completion_tokens = sum(sequence.emitted for sequence in self.sequences)
        return Usage(
            prompt_tokens=sum(len(sequence.prompt) for sequence in self._firsts),
            completion_tokens=completion_tokens,
            cached_tokens=sum(sequence.cached_tokens for sequence in self._firsts),
        )

    def pieces(self) -> list[Piece]:
        """The whole text of each choice."""
        return [
            Piece(
                index,
                self._lead(sequence) + sequence.output.text,
                sequence.output.finish_reason,
                sequence.output.stop_reason,
            )
            for index, sequence in enumerate(self.sequences)
        ]

    def running_usage(self, choice: int) -> RunningUsage:
        """Of one choice alone and without the cache's part, as vLLM tells it while it streams."""
        return RunningUsage(len(self.sequences[choice].prompt), self._sent[choice])

    @property
    def sent_usage(self) -> Usage:
        """Of all that was taken to be sent."""
        return self.usage(sum(self._sent))

    def new_pieces(self, interval: int) -> Iterator[Piece]:
        """What can be sent now: the first token of each choice alone, then `interval` at a time.

        A piece counts as sent when it is taken.
        """
        for index, sequence in enumerate(self.sequences):
            output = sequence.output
            total = len(output.tokens)
            while (start := self._sent[index]) < total:
                end = min(start + interval, total) if start else 1
                if end > sequence.emitted:
                    break
                self._sent[index] = end
                text = output.text_between(start, end)
                if not start:
                    text = self._lead(sequence) + text
                if end == total:
                    yield Piece(index, text, output.finish_reason, output.stop_reason)
                elif text:  # what a stop string cut off leaves tokens without text
                    yield Piece(index, text)

    def _lead(self, sequence: Sequence) -> str:
        return decode(sequence.prompt) if self._echo else ""
