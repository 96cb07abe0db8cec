"""The wire's models of what comes in: unknown fields are refused, types are not coerced."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from server.training.methods import Hyperparameters

TASK_ID = r"^[a-z0-9][a-z0-9._-]{0,127}$"
MAX_TEXT = 1_000_000
MAX_SEED = 2**63 - 1

Method = Literal["mhr", "mhr-z", "mhr-mu", "poly", "poly-z", "poly-mu", "lora"]
JobStatus = Literal["queued", "running", "succeeded", "failed", "cancelled"]
FinishReason = Literal["stop", "length", "stop_sequence"]


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _some_texts(values: list[str]) -> list[str]:
    if not values or "" in values:
        raise ValueError("it is empty; send at least one text, and no empty one")
    return values


def _some_answers(values: list[str]) -> list[str]:
    return _some_texts(values if all(value.strip() for value in values) else [])


def _whole_characters(value: str) -> str:
    """JSON can spell half a surrogate pair, which no tokenizer and no database takes."""
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"it holds half of a surrogate pair at character {error.start}") from None
    return value


def _storable(value: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it cannot be stored as JSON: {error}") from None
    return value


_ONE_OR_MANY = WithJsonSchema(
    {
        "anyOf": [
            {"type": "string", "minLength": 1},
            {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
        ]
    }
)
Characters = Annotated[str, AfterValidator(_whole_characters)]
Texts = Annotated[list[Characters], BeforeValidator(_as_list), AfterValidator(_some_texts), _ONE_OR_MANY]
Answers = Annotated[list[Characters], BeforeValidator(_as_list), AfterValidator(_some_answers), _ONE_OR_MANY]
Text = Annotated[Characters, Field(min_length=1, max_length=MAX_TEXT)]
Instruction = Annotated[Characters, Field(max_length=MAX_TEXT)]
Metadata = Annotated[dict[str, Any], AfterValidator(_storable)]


class Wire(BaseModel):
    """What comes in: strict and closed."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class GenerationDefaults(Wire):
    """A task's generation defaults; a request's own parameters win over them."""

    max_new_tokens: int | None = Field(
        default=None, ge=1, le=1_000_000, description="Most tokens to generate; 64 if unset"
    )
    min_new_tokens: int | None = Field(
        default=None, ge=0, description="The end token and stop strings are barred before it"
    )
    temperature: float | None = Field(default=None, ge=0, le=100, description="0 is greedy, which is the default")
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, description="0 is off")
    min_p: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED, description="The same seed gives the same tokens")
    stop: Texts | None = Field(
        default=None, description="Generation ends before the first of these strings; at most 16"
    )
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    ignore_eos: bool | None = Field(default=None, description="Go on after the end token, up to max_new_tokens")

    @model_validator(mode="after")
    def _stops_are_few(self) -> Self:
        if self.stop is not None and len(self.stop) > 16:
            raise ValueError(f"stop has {len(self.stop)} strings; at most 16 are allowed")
        return self


class Parameters(GenerationDefaults):
    """The parameters of one request."""

    n: int | None = Field(default=None, ge=1, le=128, description="Answers per input; 1 if unset")
    logprobs: int | None = Field(
        default=None, ge=0, le=20, description="Log-probabilities of the chosen tokens and of this many alternatives"
    )
    choices: Answers | None = Field(
        default=None, description="Rank these answers by length-normalised log-likelihood instead of generating"
    )

    @model_validator(mode="after")
    def _choices_stand_alone(self) -> Self:
        others = sorted(self.model_fields_set - {"choices"})
        if self.choices is not None and others:
            raise ValueError(
                f"choices are ranked, not generated, so {', '.join(others)} would have no effect; remove it"
            )
        return self


class GenerateRequest(Wire):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "task_id": "task1217_atomic_answer_generation",
                    "inputs": "PersonX takes the bus home. As a result, PersonX feels ___",
                    "parameters": {"max_new_tokens": 16},
                },
                {"task_id": "base", "inputs": ["The capital of France is"], "raw_prompt": True},
            ]
        }
    )

    task_id: str = Field(min_length=1, max_length=200, description="A task, `task@version`, `base` or `mu`")
    inputs: Texts
    parameters: Parameters = Parameters()
    stream: bool = Field(default=False, description="Answer with server-sent events")
    raw_prompt: bool = Field(
        default=False, description="Send the inputs to the model as they are, without the task's prompt"
    )

    @model_validator(mode="after")
    def _choices_do_not_stream(self) -> Self:
        if self.stream and self.parameters.choices is not None:
            raise ValueError("choices are ranked at once, so there is nothing to stream; set stream to false")
        return self


class ExampleIn(Wire):
    input: Text
    output: Answers = Field(description="The right answer, or several that count as right, the preferred one first")


class ValidationIn(Wire):
    """Exactly one of the two."""

    fraction: float | None = Field(default=None, gt=0, lt=1, description="This part of the examples is held out")
    examples: Annotated[list[ExampleIn], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.fraction is None) == (self.examples is None):
            raise ValueError("give either fraction or examples")
        return self


class HyperparametersIn(Hyperparameters):
    """The trainer's hyperparameters, held to the wire's rules."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class AdaptRequest(Wire):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "task_id": "ticket-tags",
                    "instruction": "Name the product area that the ticket is about.",
                    "examples": [
                        {"input": "The invoice shows the wrong VAT number.", "output": "billing"},
                        {"input": "I cannot reset my password.", "output": ["login", "account"]},
                    ],
                    "method": "mhr-z",
                    "promote": "if_better",
                }
            ]
        }
    )

    task_id: str = Field(pattern=TASK_ID)
    instruction: Instruction | None = Field(
        default=None, description="If unset, an existing task keeps its own and a new one has none"
    )
    examples: list[ExampleIn] = Field(min_length=2)
    method: Method = "mhr"
    inventory: str | None = Field(
        default=None, min_length=1, description="The served inventory if unset; lora takes none"
    )
    hyperparameters: HyperparametersIn = Field(default_factory=lambda: HyperparametersIn.model_validate({}))
    validation: ValidationIn | None = Field(default=None, description="A quarter of the examples is held out if unset")
    promote: Literal["if_better", "always", "never"] = "if_better"
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    metadata: Metadata = Field(default_factory=dict)


class TaskPut(Wire):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"instruction": "Answer the question with one word.", "kind": "mu", "defaults": {"stop": "\n"}}
            ]
        }
    )

    instruction: Instruction = ""
    defaults: GenerationDefaults = GenerationDefaults()
    inventory: str | None = Field(default=None, min_length=1, description="The served inventory if unset")
    kind: Literal["mu", "routing"] = "mu"
    routing: list[list[list[float]]] | None = Field(
        default=None, description="Logits [linear][head][skill] over the inventory, in the inventory's order of linears"
    )
    metadata: Metadata = Field(default_factory=dict)

    @model_validator(mode="after")
    def _routing_goes_with_its_kind(self) -> Self:
        if self.kind == "mu" and self.routing is not None:
            raise ValueError("kind `mu` has no routing; remove routing, or set kind to `routing`")
        if self.kind == "routing" and self.routing is None:
            raise ValueError("kind `routing` needs routing, the logits [linear][head][skill]")
        return self


class TaskPatch(Wire):
    instruction: Instruction | None = None
    defaults: GenerationDefaults | None = None
    metadata: Metadata | None = None

    @model_validator(mode="after")
    def _something_changes(self) -> Self:
        if self.instruction is None and self.defaults is None and self.metadata is None:
            raise ValueError("nothing to change; send instruction, defaults or metadata")
        return self


class Promotion(Wire):
    version: int = Field(ge=1)


class PageQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    limit: int = Field(default=100, ge=1, le=1000)
    cursor: str | None = Field(default=None, description="`next_cursor` of the page before")


class TaskQuery(PageQuery):
    prefix: str | None = Field(default=None, max_length=128, description="Only ids that begin with it")


class JobQuery(PageQuery):
    status: JobStatus | None = None
    task_id: str | None = Field(default=None, max_length=128)


class EventQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    after: int = Field(default=0, ge=0, description="Only events with a greater `seq`")


class ExportQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: int | None = Field(default=None, ge=1, description="The served version if unset")
