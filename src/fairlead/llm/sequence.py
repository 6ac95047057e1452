"""One generation on its way through the engine."""

from fairlead.core.generation import Sampling
from fairlead.llm.adapters import Use


class Sequence:
    """The tokens of one generation: those of the prompt, then those that were chosen.

    One rule moves it: the tokens computed (whose K and V are in its blocks) catch up with the tokens known. A prompt is
    many known and few computed; a decode is one behind; a preempted sequence starts again from zero with all it knows.
    A token that a step under way chooses has its place from the moment the step is planned: who plans another step before
    the host knows the token counts it, who needs its id finds it on the device.
    """

    __slots__ = (
        "adapter",
        "arrived",
        "blocks",
        "cached_tokens",
        "deadline",
        "draft",
        "hashes",
        "id",
        "num_computed",
        "num_pending",
        "num_preemptions",
        "num_prompt",
        "priority",
        "row",
        "salt",
        "sampling",
        "scheduled_at",
        "token_ids",
    )

    def __init__(
        self,
        id: int,
        prompt_ids: list[int],
        sampling: Sampling,
        *,
        arrived: float = 0.0,
        priority: int = 0,
        deadline: float = float("inf"),
        salt: str = "",
        adapter: Use | None = None,
    ) -> None:
        """`arrived`, `deadline`: seconds of the engine's clock; `priority`: smaller goes first."""
        self.id = id
        self.token_ids = list(prompt_ids)
        self.num_prompt = len(prompt_ids)
        self.draft: list[int] = []
        """Tokens that may follow, proposed for the next step alone: it computes them with the last one known, and those that
        turn out to be chosen become known. Only of one that decodes."""
        self.num_computed = 0
        """Tokens that are computed, or that a step under way computes."""
        self.num_pending = 0
        """Tokens after `token_ids` that steps under way choose: one for each."""
        self.blocks: list[int] = []
        """Block ids, in the order of its tokens."""
        self.hashes: list[bytes] = []
        """Chain hashes of its full blocks as far as they were needed."""
        self.row = -1
        """Its row in the runner's state while it runs."""
        self.sampling = sampling
        self.arrived = arrived
        self.priority = priority
        self.deadline = deadline
        """When it is given up if it has not started by then."""
        self.salt = salt if adapter is None else f"{salt}\0{adapter.identity}"
        """What is computed of the same tokens differs with it: of the prefix cache."""
        self.adapter = adapter
        self.cached_tokens = 0
        """Of its prompt, found in the prefix cache when it first started."""
        self.scheduled_at = -1.0
        """When it first got tokens to compute; -1 before."""
        self.num_preemptions = 0

    @property
    def num_tokens(self) -> int:
        """Known or pending."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt

    def __repr__(self) -> str:
        return f"Sequence({self.id}, {self.num_computed}/{self.num_tokens} tokens, {len(self.blocks)} blocks)"
