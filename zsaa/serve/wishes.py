"""What a request may hold: OpenAI's fields, as far as they are supported, and ours: alpha and pruning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt

MAX_PROMPTS = 16  # of one request
Number = Annotated[float, Field(allow_inf_nan=False)]


class Dialled(BaseModel):
    """alpha: the share of tokens that each layer keeps, for this request; without it the server says. pruning: False
    forbids it: alpha is 1 however long the queue is."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)
    model: str | None = None
    user: str | None = None
    alpha: Annotated[Number, Field(gt=0, le=1)] | None = None
    pruning: StrictBool = True

    @property
    def asked(self) -> float | None:
        return self.alpha if self.pruning else 1.0


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)
    include_usage: StrictBool = False


class Written(Dialled):
    """What completions and chats share."""

    temperature: Annotated[Number, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    seed: StrictInt | None = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=64)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=64)]], Field(max_length=4)]
        | None
    ) = None
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1
    # What some clients send always, at the one value that changes nothing.
    presence_penalty: Literal[0] = 0
    frequency_penalty: Literal[0] = 0
    logit_bias: Annotated[dict, Field(max_length=0)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class Completion(Written):
    prompt: str | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
    max_tokens: Annotated[StrictInt, Field(ge=1)] = 16
    logprobs: None = None
    suffix: None = None
    echo: Literal[False] = False
    best_of: Literal[1] | None = None

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)
    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(min_length=1, max_length=256)]

    @property
    def plain(self) -> dict[str, str]:
        """As templates of models know it: one text, and "system" for its newer name."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class PlainText(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)
    type: Literal["text"]


class Chat(Written):
    logprobs: Literal[False] | None = None
    response_format: PlainText | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=256)]
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None


class Classification(Dialled):
    input: str | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]

    @property
    def texts(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input
