"""langchain-tests' own suite for chat models, on a policy of a running Hone server.

The pocket policy knows one desk and nothing else: what takes a model with more wit is named below.
"""

import os

import pytest
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

WIT = "takes a model that can fill in the arguments of a tool it has never seen"
LENGTH = "takes a model that ends a string of free text; this one goes on to max_tokens"
BEYOND = {
    "test_tool_calling": WIT,
    "test_tool_calling_async": WIT,
    "test_bind_runnables_as_tools": WIT,
    "test_tool_choice": WIT,
    "test_tool_calling_with_no_arguments": WIT,
    "test_agent_loop": WIT,
    "test_unicode_tool_call_integration": WIT,
    "test_structured_output": LENGTH,
    "test_structured_output_async": LENGTH,
    "test_structured_output_pydantic_2_v1": LENGTH,
    "test_structured_output_optional_param": LENGTH,
}
for name, reason in BEYOND.items():
    pytest.mark.xfail(reason=reason)(getattr(ChatModelIntegrationTests, name))


class TestHone(ChatModelIntegrationTests):
    """The suite."""

    @property
    def chat_model_class(self) -> type[ChatOpenAI]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, object]:
        return {
            "model": "desk",
            "base_url": f"{os.environ['HONE_URL']}/v1",
            "api_key": "unused",
            "temperature": 1,
            "max_tokens": 200,
            "max_retries": 0,
            "stream_usage": True,
        }
