"""The evaluations of a run: on held-out records, before, between and after its steps."""

import math

from bft.encode import Record
from bft.evaluate import evaluate
from bft.metrics import MetricLog
from bft.nonfinite import NonFinite
from bft.run import Run


class Evaluator:
    """Evaluates at a step, on every rank all records, so that shards stay in step."""

    def __init__(
        self, run: Run, held_out: list[Record], trained_on: list[Record], log: MetricLog
    ) -> None:
        self.held_out, self.log, self.training = held_out, log, run
        self.answered = [record for record in trained_on if "answer" in record.extra]

    def run(self, step: int) -> None:
        """Evaluates, unless a resumed run finds that this was done.

        Raises:
            NonFinite: the model gives no finite loss; its numbers are in the log.
        """
        config, accelerator = self.training.config, self.training.accelerator
        if not self.held_out or any(row["step"] == step for row in self.log.of("eval")):
            return
        with accelerator.autocast():
            result = evaluate(
                accelerator.unwrap_model(self.training.model),
                self.training.tokenizer,
                self.held_out,
                train=self.answered,
                max_length=config.max_length,
                progress=accelerator.is_main_process,
            ).to_dict()
        self.log.write("eval", step, result)
        if not math.isfinite(result["nll"]):
            raise NonFinite(
                f"evaluation after step {step}: nll is {result['nll']}; the model is broken. "
                "Start anew with a lower --learning-rate, or with another --model"
            )
