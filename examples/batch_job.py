"""A nightly job: a sync DSPy program over many tickets at once, a session per customer, and a bill at the end.

Run it with ``python examples/batch_job.py``. The LM is ``LM_MODEL`` at ``LM_API_BASE``, by default OpenAI's; traces go
to ``MLFLOW_TRACKING_URI``. All failed tickets are kept, and a tenth of the others.
"""

import os

import dspy

import dspy_mlflow_async as dma

TICKETS = [
    {"customer": "ada", "text": "The pears arrived bruised."},
    {"customer": "ada", "text": "When do you open?"},
    {"customer": "bob", "text": "I want my money back."},
    {"customer": "cleo", "text": "Thank you for the apples!"},
] * 5


class Triage(dspy.Module):
    """Sorts a ticket."""

    def __init__(self) -> None:
        super().__init__()
        self.classify = dspy.Predict("ticket -> urgency, team")

    def forward(self, customer: str, ticket: str) -> dspy.Prediction:
        """Sort one ticket; the customer is not the LM's business."""
        return self.classify(ticket=ticket)


def main() -> None:
    """Sort all tickets."""
    dma.autolog()
    dspy.configure(lm=dspy.LM(os.environ.get("LM_MODEL", "openai/gpt-4o-mini"), api_base=os.environ.get("LM_API_BASE")))
    triage = dma.wrap(
        Triage(),
        session_id=lambda customer, ticket: f"tickets-{customer}",
        user=lambda customer, ticket: customer,
        sample={"ok": float(os.environ.get("KEEP", "0.1")), "error": 1.0},
    )
    examples = [
        dspy.Example(customer=ticket["customer"], ticket=ticket["text"]).with_inputs("customer", "ticket")
        for ticket in TICKETS
    ]
    with dma.request(tags={"job": "triage"}) as did:
        results = triage.batch(examples, num_threads=8, return_failed_examples=True, disable_progress_bar=True)
    done = [result for result in results[0] if result is not None]
    dma.flush(timeout=30)
    print(
        f"{len(done)} of {len(TICKETS)} tickets sorted, {len(did.lm_calls)} LM calls, "
        f"{did.usage.get('total_tokens', 0)} tokens, {did.cost or 0:.4f} USD"
    )
    print(f"traces stored: {dma.stats().stored}, sampled away: {dma.stats().sampled_out}")


if __name__ == "__main__":
    main()
