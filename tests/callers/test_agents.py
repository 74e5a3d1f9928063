"""A task that is wrapped as a function works as a tool of each agent framework, as in docs/how-to/agents.md.

The framework packages are the real ones. A script takes the place of the model.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from contextvars import ContextVar
from typing import Annotated, Any, TypedDict

import pytest
from celery import Celery

from celery_idem import IdempotentTask
from celery_idem.adapters.agents import async_function, function
from tests.support.effects import Effects
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.redis, pytest.mark.usefixtures("worker")]


@pytest.fixture
def pay(shop: Celery) -> Any:
    return function(shop, "shop.pay")


def bill(name: str, **more: Any) -> dict[str, Any]:
    return {"customer": name, "invoice": "7", "cents": 1, **more}


# --- the function ----------------------------------------------------------------------


def test_it_looks_like_the_task(pay: Any, shop: Celery) -> None:
    assert pay.__name__ == "shop_pay"
    assert pay.__doc__.startswith("Pay one invoice of a customer.\n\nSafe to call again")
    signature = inspect.signature(pay)
    assert list(signature.parameters) == ["customer", "invoice", "cents", "currency", "note"]
    assert signature.parameters["currency"].default == "EUR"
    hint = signature.parameters["note"].annotation
    assert (hint.__origin__, hint.__metadata__[0].description) == (
        str,
        "Free: other words here do not make it another action.",
    )
    twin = async_function(shop, "shop.pay")
    assert inspect.iscoroutinefunction(twin)
    assert (twin.__name__, twin.__doc__) == (pay.__name__, pay.__doc__)
    assert str(inspect.signature(twin)) == str(signature)


def test_its_twin_answers_and_never_raises(shop: Celery, done: Effects, name: str) -> None:
    whose = ContextVar("whose", default="")

    async def answers() -> list[dict[str, Any]]:
        pay = async_function(shop, "shop.pay", scope=whose.get)
        whose.set("acme")
        return [await pay(**bill(name)), await pay(name, "7", 1, note="b"), await pay(name)]

    first, again, wrong = asyncio.run(answers())
    assert (first["status"], again["status"], wrong["code"]) == ("executed", "replayed", "invalid")
    assert first["key"] == shop.tasks["shop.pay"].intent_key(name, "7", 1, scope="acme")
    assert done.count(f"pay-{name}-7") == 1


def test_it_answers_and_never_raises(pay: Any, shop: Celery, done: Effects, name: str) -> None:
    first = pay(name, "7", 1, note="a")
    again = pay(cents=1, customer=name, invoice="7", note="b")
    assert (first["status"], again["status"]) == ("executed", "replayed")
    assert first["result"] == again["result"] == {"paid": 1, "invoice": "7"}
    assert pay(name, "7", 2)["differs"] == ["cents"]
    for wrong in (pay(name), pay(name, "7", 1, 2, 3, 4), pay(object(), "7", 1)):
        assert (wrong["status"], wrong["key"]) == ("failed", "")
        assert wrong["next"] == "Nothing was done. Correct the arguments and call again."
    assert done.count(f"pay-{name}-7") == 1
    fails = function(shop, "shop.fails")
    assert fails(name)["reason"] == "ValueError: error"


def test_scope_and_occurrence(shop: Celery, done: Effects, name: str) -> None:
    whose = ["acme"]
    pay = function(shop, "shop.pay", scope=lambda: whose[0], occurrences=True)
    assert list(inspect.signature(pay).parameters)[-1] == "occurrence"
    assert [pay(**bill(name))["status"] for _ in range(2)] == ["executed", "replayed"]
    assert pay(**bill(name), occurrence="second")["status"] == "executed"
    whose[0] = "initech"
    assert pay(**bill(name))["status"] == "executed"
    assert done.count(f"pay-{name}-7") == 3


def test_odd_signatures() -> None:
    app = Celery("odd", set_as_current=False)
    app.conf.update(idem_store="memory://odd", task_always_eager=True)

    @app.task(base=IdempotentTask, shared=False, bind=True, name="odd.one", intent=("first", "extra"))
    def one(self: Any, first: int, /, second: Annotated[str, "words"] = "x", **more: Any) -> dict[str, Any]:
        return {"first": first, **more}

    tool = function(app, "odd.one", occurrences=True)
    assert list(inspect.signature(tool).parameters) == ["first", "second", "occurrence", "more"]
    assert tool(first=1, extra=2)["result"] == {"first": 1, "extra": 2}
    assert tool(1, "reworded", extra=2)["status"] == "replayed"


# --- LangGraph -------------------------------------------------------------------------


def test_langgraph_resume_begins_the_node_anew(pay: Any, done: Effects, name: str) -> None:
    """A node pays and then asks a person. LangGraph repeats the whole node on resume; the payment is replayed."""
    from langchain_core.tools import StructuredTool
    from langgraph.checkpoint.memory import InMemorySaver
    from langgraph.graph import END, START, StateGraph
    from langgraph.types import Command, interrupt

    tool = StructuredTool.from_function(pay)
    assert set(tool.args) == {"customer", "invoice", "cents", "currency", "note"}
    assert tool.args["note"]["description"].startswith("Free:")
    seen: list[str] = []

    class State(TypedDict, total=False):
        answer: dict[str, Any]

    def act(state: State) -> State:
        answer = tool.invoke(bill(name, note=f"plan {len(seen)}"))
        seen.append(answer["status"])
        if interrupt("May I tell the customer?") != "yes":
            raise AssertionError("the person said yes")
        return {"answer": answer}

    graph = StateGraph(State).add_node("act", act).add_edge(START, "act").add_edge("act", END)
    running = graph.compile(checkpointer=InMemorySaver())
    thread = {"configurable": {"thread_id": name}}
    assert "__interrupt__" in running.invoke({}, thread)
    final = running.invoke(Command(resume="yes"), thread)
    assert seen == ["executed", "replayed"]
    assert final["answer"]["result"] == {"paid": 1, "invoice": "7"}
    assert done.count(f"pay-{name}-7") == 1


@pytest.mark.parametrize("lost", [True, False], ids=["writes lost", "writes kept"])
def test_langgraph_resume_with_a_finished_sibling(pay: Any, done: Effects, name: str, lost: bool) -> None:
    """Two nodes run in one step: one pays and finishes, the other asks a person.

    The checkpointer keeps what a finished node wrote, so LangGraph does not repeat that node on resume. If the writes
    are lost, LangGraph repeats the node and the payment is replayed. LangGraph saves the writes after the node, so
    they are lost if the process is killed in between.
    """
    from langchain_core.tools import StructuredTool
    from langgraph.checkpoint.memory import InMemorySaver
    from langgraph.graph import END, START, StateGraph
    from langgraph.types import Command, interrupt

    class Checkpoints(InMemorySaver):
        loses = lost

        def put_writes(self, config: Any, writes: Any, task_id: str, task_path: str = "") -> None:
            if self.loses and any(channel == "answer" for channel, _ in writes):
                self.loses = False  # as if the process was killed, once
                return
            super().put_writes(config, writes, task_id, task_path)

    tool = StructuredTool.from_function(pay)
    seen: list[str] = []

    class State(TypedDict, total=False):
        answer: dict[str, Any]
        said: str

    def act(state: State) -> State:
        answer = tool.invoke(bill(name, note=f"plan {len(seen)}"))
        seen.append(answer["status"])
        return {"answer": answer}

    def ask(state: State) -> State:
        return {"said": interrupt("May I tell the customer?")}

    graph = StateGraph(State).add_node("act", act).add_node("ask", ask)
    graph.add_edge(START, "act").add_edge(START, "ask").add_edge("act", END).add_edge("ask", END)
    running = graph.compile(checkpointer=Checkpoints())
    thread = {"configurable": {"thread_id": name}}
    stopped = running.invoke({}, thread)
    assert "__interrupt__" in stopped
    assert stopped["answer"]["result"] == {"paid": 1, "invoice": "7"}  # the sibling had finished
    final = running.invoke(Command(resume="yes"), thread)
    assert seen == (["executed", "replayed"] if lost else ["executed"])
    assert (final["answer"]["result"], final["said"]) == ({"paid": 1, "invoice": "7"}, "yes")
    assert done.count(f"pay-{name}-7") == 1


def test_langgraph_resume_with_a_finished_sibling_call(pay: Any, done: Effects, name: str) -> None:
    """One tool node makes two calls, and one of them asks a person. LangGraph repeats both; the payment is replayed."""
    from langchain_core.messages import AIMessage
    from langgraph.checkpoint.memory import InMemorySaver
    from langgraph.graph import END, START, MessagesState, StateGraph
    from langgraph.prebuilt import ToolNode
    from langgraph.types import Command, interrupt

    seen: list[str] = []

    def shop_pay(customer: str, invoice: str, cents: int) -> dict[str, Any]:
        """Pay one invoice of a customer."""
        answer: dict[str, Any] = pay(customer, invoice, cents, note=f"plan {len(seen)}")
        seen.append(answer["status"])
        return answer

    def ask() -> str:
        """Ask a person, once the other call has finished."""
        wait_for(lambda: bool(seen), 30.0, "the payment")
        return str(interrupt("May I tell the customer?"))

    graph = StateGraph(MessagesState).add_node("tools", ToolNode([shop_pay, ask]))
    graph.add_edge(START, "tools").add_edge("tools", END)
    running = graph.compile(checkpointer=InMemorySaver())
    thread = {"configurable": {"thread_id": name}}
    calls = [{"name": "shop_pay", "args": bill(name), "id": "a"}, {"name": "ask", "args": {}, "id": "b"}]
    assert "__interrupt__" in running.invoke({"messages": [AIMessage("", tool_calls=calls)]}, thread)
    assert seen == ["executed"]
    paid, said = running.invoke(Command(resume="yes"), thread)["messages"][-2:]
    assert seen == ["executed", "replayed"]
    assert (json.loads(paid.content)["result"], said.content) == ({"paid": 1, "invoice": "7"}, "yes")
    assert done.count(f"pay-{name}-7") == 1


def test_langgraph_tool_node(pay: Any, done: Effects, name: str) -> None:
    """The model makes the same call twice in one turn and once in the next, each time with a new call id."""
    from langchain_core.messages import AIMessage
    from langgraph.graph import END, START, MessagesState, StateGraph
    from langgraph.prebuilt import ToolNode

    graph = StateGraph(MessagesState).add_node("tools", ToolNode([pay]))
    running = graph.add_edge(START, "tools").add_edge("tools", END).compile()
    statuses = []
    for turn in (["a", "b"], ["c"]):
        calls = [{"name": "shop_pay", "args": bill(name, note=note), "id": note} for note in turn]
        answer = running.invoke({"messages": [AIMessage("", tool_calls=calls)]})
        statuses += [json.loads(message.content)["status"] for message in answer["messages"][1:]]
    assert sorted(statuses) == ["executed", "replayed", "replayed"]
    assert done.count(f"pay-{name}-7") == 1


def test_langgraph_awaits(shop: Celery, done: Effects, name: str) -> None:
    from langchain_core.messages import AIMessage
    from langchain_core.tools import StructuredTool
    from langgraph.graph import END, START, MessagesState, StateGraph
    from langgraph.prebuilt import ToolNode

    tool = StructuredTool.from_function(coroutine=async_function(shop, "shop.pay"))
    graph = StateGraph(MessagesState).add_node("tools", ToolNode([tool]))
    running = graph.add_edge(START, "tools").add_edge("tools", END).compile()
    calls = [{"name": "shop_pay", "args": bill(name, note=note), "id": note} for note in ("a", "b")]
    answer = asyncio.run(running.ainvoke({"messages": [AIMessage("", tool_calls=calls)]}))
    statuses = [json.loads(message.content)["status"] for message in answer["messages"][1:]]
    assert sorted(statuses) == ["executed", "replayed"]
    assert done.count(f"pay-{name}-7") == 1


# --- OpenAI Agents SDK -----------------------------------------------------------------


@pytest.mark.parametrize("make", [function, async_function])
def test_openai_agents(make: Any, shop: Celery, done: Effects, name: str) -> None:
    """A scripted model that calls three times, the last time with another amount."""
    import agents
    from openai.types.responses import ResponseFunctionToolCall, ResponseOutputMessage, ResponseOutputText

    class Script(agents.Model):
        """A model that makes the given calls in order and keeps the tool results that it receives."""

        def __init__(self, *plans: dict[str, Any]) -> None:
            self.plans = list(plans)
            self.read: list[str] = []

        async def get_response(self, *args: Any, **request: Any) -> Any:
            self.read = [
                str(item["output"]) for item in request["input"] if item.get("type") == "function_call_output"
            ]
            if self.plans:
                number = len(self.plans)
                output: Any = ResponseFunctionToolCall(
                    type="function_call",
                    name="shop_pay",
                    call_id=f"call-{number}",  # a new one every turn
                    arguments=json.dumps(self.plans.pop(0)),
                )
            else:
                text = ResponseOutputText(type="output_text", text="done", annotations=[])
                output = ResponseOutputMessage(
                    id="1", type="message", role="assistant", status="completed", content=[text]
                )
            return agents.ModelResponse(output=[output], usage=agents.Usage(), response_id=None)

        def stream_response(self, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError

    agents.set_tracing_disabled(True)
    model = Script(bill(name, note="a"), bill(name, note="b"), bill(name, cents=2, note="c"))
    agent = agents.Agent(name="biller", model=model, tools=[agents.function_tool(make(shop, "shop.pay"))])
    result = asyncio.run(asyncio.wait_for(agents.Runner.run(agent, "Pay invoice 7."), 60))
    assert result.final_output == "done"
    assert [
        next(status for status in ("executed", "replayed", "conflict") if f"'status': '{status}'" in text)
        for text in model.read
    ] == ["executed", "replayed", "conflict"]
    assert not any("Please try again" in text for text in model.read)
    assert "Already done earlier; nothing was done now. Report it as done." in model.read[1]
    assert done.count(f"pay-{name}-7") == 1


# --- pydantic-ai -----------------------------------------------------------------------


@pytest.mark.parametrize("make", [function, async_function])
def test_pydantic_ai(make: Any, shop: Celery, done: Effects, name: str) -> None:
    from pydantic_ai import Agent
    from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, ToolCallPart, ToolReturnPart
    from pydantic_ai.models.function import AgentInfo, FunctionModel

    returned: list[Any] = []

    def model(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        tool = info.function_tools[0]
        assert tool.parameters_json_schema["properties"]["note"]["description"].startswith("Free:")
        returned[:] = [
            part.content for message in messages for part in message.parts if isinstance(part, ToolReturnPart)
        ]
        if len(returned) == 3:
            return ModelResponse(parts=[TextPart("done")])
        return ModelResponse(parts=[ToolCallPart(tool.name, bill(name, note=f"plan {len(returned)}"))])

    result = Agent(FunctionModel(model), tools=[make(shop, "shop.pay")]).run_sync("Pay invoice 7.")
    assert result.output == "done"
    assert [content["status"] for content in returned] == ["executed", "replayed", "replayed"]
    assert done.count(f"pay-{name}-7") == 1


# --- Airflow ---------------------------------------------------------------------------


def airflow_pay(context: dict[str, Any], shop: Celery, customer: str, invoice: str, cents: int) -> Any:
    """The task body of the recipe. Its key has dag, run, task and map index, which are the same in every try."""
    from celery_idem import submit

    ti = context["ti"]
    key = f"{ti.dag_id}/{ti.run_id}/{ti.task_id}/{ti.map_index}"
    kwargs = {"customer": customer, "invoice": invoice, "cents": cents}
    receipt = submit(shop, "shop.pay", kwargs=kwargs, idempotency_key=key).wait(20)
    if not receipt.done:
        raise RuntimeError(f"{receipt.next} {receipt.reason}")
    return receipt.result


def test_airflow_recipe(shop: Celery, done: Effects, name: str) -> None:
    """A repeated try pays once. The test has a task instance with Airflow's attribute names and needs no Airflow."""

    class TaskInstance:
        def __init__(self, run: str, try_number: int, map_index: int = -1) -> None:
            self.dag_id, self.run_id, self.task_id = "billing", f"{name}-{run}", "pay"
            self.try_number, self.map_index = try_number, map_index

    tries = [TaskInstance("monday", 1), TaskInstance("monday", 2), TaskInstance("tuesday", 1)]
    tries += [TaskInstance("tuesday", 1, 0), TaskInstance("tuesday", 1, 1), TaskInstance("tuesday", 2, 1)]
    for ti in tries:
        assert airflow_pay({"ti": ti}, shop, name, "7", 1) == {"paid": 1, "invoice": "7"}
    assert done.count(f"pay-{name}-7") == 4
    with pytest.raises(RuntimeError, match="Key already used with different cents"):
        airflow_pay({"ti": tries[0]}, shop, name, "7", 2)
