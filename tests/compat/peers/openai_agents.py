"""openai-agents on a policy of a running Hone server, as its own loop with tools of the client's,
and on an agent, whose loop is Hone's."""

import asyncio
import os

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI

set_tracing_disabled(disabled=True)
client = AsyncOpenAI(base_url=f"{os.environ['HONE_URL']}/v1", api_key="unused", max_retries=0)
called: list[tuple[str, str]] = []


@function_tool
def find_orders(customer: str, item: str) -> str:
    """Orders of a customer for an item, with their numbers and days."""
    called.append((customer, item))
    return '{"orders": [{"order": 48213, "days_ago": 3}]}'


def model(name: str) -> OpenAIChatCompletionsModel:
    return OpenAIChatCompletionsModel(model=name, openai_client=client)


async def main() -> None:
    loop = Agent(
        name="desk",
        instructions="You work the order desk.",
        model=model("desk"),
        tools=[find_orders],
        model_settings=ModelSettings(temperature=0, max_tokens=200),
        tool_use_behavior="stop_on_first_tool",
    )
    wish = "Please cancel the lamp of Bavorik."
    done = await Runner.run(loop, wish, max_turns=3)
    assert called, "the policy called the client's tool"
    assert "48213" in str(done.final_output), done.final_output

    streamed = Runner.run_streamed(loop, wish, max_turns=3)
    kinds = {event.type async for event in streamed.stream_events()}
    assert "raw_response_event" in kinds, kinds
    assert len(called) == 2, called

    served = Agent(name="served", model=model("agent:desk"))
    answer = await Runner.run(served, wish, max_turns=1)
    assert isinstance(answer.final_output, str)


asyncio.run(main())
print("openai-agents: ok")
