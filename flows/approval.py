"""A person's answer to a decision of the gate, given in Prefect's UI or by `prefect` itself."""

from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from prefect.runtime import deployment, flow_run
from pydantic import Field

from belt_tasks import model_summaries
from belt_tasks.errors import ConfigError
from belt_tasks.gate import DecisionRecord


class Approval(RunInput):
    """Whether the challenger takes the champion's place; reason and name go into the registry's history."""

    approve: bool = False
    reason: str = Field(min_length=1, max_length=1000)
    who: str = Field(min_length=1, max_length=1000)


def check_can_wait() -> None:
    """Refuse to wait for a person where no worker could go on afterwards.

    Raises:
        ConfigError: this flow run is not one of a deployment, or a part of another.
    """
    if deployment.get_id() is None or flow_run.get_parent_flow_run_id() is not None:
        raise ConfigError(
            "approval: to wait for a person a run must be one of a deployment and not a part of another run, since its "
            "process ends meanwhile; deploy the flow, or choose approval 'gate'"
        )


def ask(record: DecisionRecord) -> Approval:
    """A person's answer to this very decision.

    Until there is one, this process ends and the run is suspended; when it is resumed with an answer, the flow begins
    anew, finds all that it did before, and gets here again.
    """
    question = Approval.with_initial_data(description=model_summaries.decision_summary(record))
    return suspend_flow_run(wait_for_input=question, key=record.id)
