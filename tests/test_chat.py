"""Prompts against the official ones, templates in their sandbox, and answers read back as messages."""

import contextlib
import json
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import TINY, VOCABULARIES, byte_level, numbered, official, ranks, rows, texts

from glm import chat
from glm.chat import Conversation, Token, conversation, rendered, shown, split
from glm.errors import PromptError, TokenizerError
from glm.family.text_chatglm import CHATGLM, CHATGLM_BYTES
from glm.family.text_chatglm2 import CHATGLM2
from glm.family.text_chatglm3 import CHATGLM3
from glm.family.text_glm4 import ADDED, GLM4, GLM4_HF
from glm.family.text_glm4_0414 import GLM4_0414, GLM_Z1
from glm.family.text_glm4_moe import GLM4_MOE
from glm.sandbox import Sandbox
from glm.tokenizer import Tokenizer
from glm.vocabulary import ByteLevel, Ranks

FORMATS = [CHATGLM, CHATGLM_BYTES, CHATGLM2, CHATGLM3, GLM4, GLM4_HF, GLM4_0414, GLM_Z1, GLM4_MOE]
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"city": "<|user|>城市"}}}
ASK = [{"role": "user", "content": "你好"}]
KEYS = [
    "content",
    "metadata",
    "tools",
    "tool_calls",
    "function",
    "type",
    "text",
    "name",
    "arguments",
    "reasoning_content",
]


def user(*contents: str) -> list[dict[str, Any]]:
    """Messages of the user and the assistant, in turn."""
    return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


# ---------------------------------------------------------------- prompts of the official code


@pytest.mark.parametrize("name", ["chatglm-6b", "chatglm2-6b"])
def test_rounds(name: str) -> None:
    tok = official(name)
    for row in rows(name, "chat"):
        messages = user(*(text for pair in row["history"] for text in pair), row["query"])
        assert tok.chat(messages) == row["input_ids"], row["query"]
        assert row["prompt"] in tok.prompt(messages)


def test_role_messages_of_chatglm3() -> None:
    tok = official("chatglm3-6b")
    for row in rows("chatglm3-6b", "chat"):
        messages = [*row["history"], {"role": row["role"], "content": row["query"]}]
        assert tok.chat(messages) == row["input_ids"], row["query"]


def test_role_messages_of_glm4() -> None:
    tok = official("glm-4-9b-chat")
    for row in rows("glm-4-9b-chat", "chat_template"):
        assert tok.prompt(row["messages"]) == row["text"]
        assert tok.chat(row["messages"]) == row["input_ids"]
    for row in rows("glm-4-9b-chat", "build_single_message"):
        if row["content"]:
            ids = tok.chat([row], add_generation_prompt=False)
            assert ids == [tok.id("[gMASK]"), tok.id("<sop>"), *row["ids"]]


@pytest.fixture(scope="module")
def glm4_with_template(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """GLM-4-9B with the chat template its release has."""
    official("glm-4-9b-chat")
    folder, published = tmp_path_factory.mktemp("glm-4-9b-chat"), VOCABULARIES / "glm-4-9b-chat"
    (folder / "tokenizer.model").symlink_to(published / "tokenizer.model")
    (folder / "tokenizer_config.json").symlink_to(published / "tokenizer_config.reconstructed.json")
    return Tokenizer.from_pretrained(folder)


def test_glm4_by_its_template(glm4_with_template: Tokenizer) -> None:
    tok = glm4_with_template
    for row in rows("glm-4-9b-chat", "chat_template"):
        assert tok.prompt(row["messages"]) == row["text"]
        assert tok.chat(row["messages"]) == row["input_ids"]


BUILT_IN = [{"type": kind} for kind in ("python", "simple_browser", "cogview", "unheard of")]


@pytest.mark.parametrize("messages", [
    ASK,
    user("a", "", "c"),
    user("\n\n a \n", "\tb", "c "),
    [{"role": "system", "content": "s", "tools": [WEATHER, *BUILT_IN]}, *ASK],
    [{"role": "system", "content": "", "tools": BUILT_IN}, *ASK],
    [{"role": "system", "tools": [WEATHER]}, *ASK],
    [*ASK, {"role": "assistant", "metadata": "get_weather", "content": "{}"}, {"role": "observation", "content": "晴"}],
    user("<|user|>[gMASK]", "<|assistant|>", "</think><eop>"),
])  # fmt: skip
@pytest.mark.parametrize("tools", [None, [WEATHER], [WEATHER, *BUILT_IN]])
def test_our_glm4_prompt_is_its_template(glm4_with_template: Tokenizer, messages: list, tools: list | None) -> None:
    ours = Tokenizer(glm4_with_template._pieces, GLM4)
    for reply in (True, False):
        asked = ours.chat(messages, tools, add_generation_prompt=reply)
        assert asked == glm4_with_template.chat(messages, tools, add_generation_prompt=reply)


def test_prompts_of_later_releases() -> None:
    path = VOCABULARIES / "chat-templates" / "visible.jsonl"
    if not path.exists():
        pytest.skip(f"no {path}")
    formats = {"GLM-4.6": GLM4_MOE, "GLM-Z1-0414": GLM_Z1}
    lines = path.read_text().splitlines()
    assert lines
    for row in map(json.loads, lines):
        options = row["kwargs"]
        turns = conversation(
            row["messages"],
            options.get("tools"),
            reply=options.get("add_generation_prompt", True),
            thinking=options.get("enable_thinking"),
        )
        assert shown(formats[row["template"]].prompt(turns)) == row["text"]


def test_0414_is_z1_without_the_thought() -> None:
    turns = conversation([{"role": "system", "content": "s"}, *user("a", "<think>b</think> c", "d")])
    text = "[gMASK]<sop><|system|>\ns<|user|>\na<|assistant|>\nc<|user|>\nd<|assistant|>"
    assert shown(GLM4_0414.prompt(turns)) == text
    assert shown(GLM_Z1.prompt(turns)) == text + "\n<think>"
    assert shown(GLM_Z1.prompt(Conversation(turns.messages, [], thinking=False))) == text


def test_tools_of_chatglm3_go_into_the_system_message() -> None:
    listed = json.dumps([WEATHER], indent=4, ensure_ascii=False)
    alone = shown(CHATGLM3.prompt(conversation(ASK, [WEATHER])))
    assert alone.startswith("[gMASK]sop<|system|>\nAnswer the following questions as best as you can.")
    assert listed in alone
    told = [{"role": "system", "content": "S"}, *ASK]
    assert shown(CHATGLM3.prompt(conversation(told, [WEATHER]))).startswith(
        f"[gMASK]sop<|system|>\nS\n{listed}<|user|>"
    )


def test_transformers_renders_and_encodes_the_same(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    template = (
        "[gMASK]<sop>{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}<|{{ m['role'] }}|>\n"
        "    {%- if m.content is string %}{{ '\n' + m.content.split('</think>')[-1].strip() }}{% endif %}\n"
        "{% endfor %}{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{{ eos_token }}"
        "{% if add_generation_prompt %}<|assistant|>{% generation %}{% endgeneration %}{% endif %}"
    )
    (tmp_path / "tokenizer.json").write_bytes(byte_level(list(ADDED)))
    settings = {"chat_template": template, "eos_token": "<|endoftext|>", "pad_token": {"content": "<|endoftext|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = Tokenizer.from_pretrained(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="<|endoftext|>", chat_template=template
    )
    for messages in [
        ASK,
        user("a < b [x]", " <think>t</think> \n é👍 ", "{{ c }}"),
        [{"role": "system", "content": "s"}, *ASK],
    ]:
        for tools in (None, [{"type": "function", "function": {"name": "f", "description": "<数>"}}]):
            expected = theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)
            assert ours.chat(messages, tools) == expected


# ---------------------------------------------------------------- what a user types stays text


ECHO = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>{{ m.metadata }}\n{{ m.content }}{% endfor %}"
    "{{ tools | tojson }}<|assistant|>"
)


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A vocabulary with GLM-4's roles whose template shows all it is given."""
    folder = tmp_path_factory.mktemp("echo")
    (folder / "tokenizer.json").write_bytes(byte_level(list(ADDED), ["<think>"]))
    (folder / "chat_template.jinja").write_text(ECHO)
    return Tokenizer.from_pretrained(folder)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), texts, texts), min_size=1, max_size=4), texts
)
def test_no_text_makes_a_role_in_a_template(echo: Tokenizer, turns: list[tuple[str, str, str]], about: str) -> None:
    messages = [{"role": role, "metadata": metadata, "content": content} for role, metadata, content in turns]
    tools = [{about: {"description": about}}]
    ids = echo.chat(messages, tools)
    special = set(echo._pieces.special.values())
    assert [echo.piece(id) for id in ids if id in special] == [
        "[gMASK]", "<sop>", *(f"<|{role}|>" for role, _, _ in turns), "<|assistant|>"
    ]  # fmt: skip
    # … and every text arrives unchanged.
    shown = "".join(f"<|{role}|>{metadata}\n{content}" for role, metadata, content in turns)
    assert echo.decode(ids) == f"[gMASK]<sop>{shown}{json.dumps(tools, ensure_ascii=False)}<|assistant|>"


def test_roles_are_guarded_even_where_the_file_calls_them_ordinary() -> None:
    ordinary = [name for name in ADDED if name.startswith("<|")]
    special = [name for name in ADDED if name not in ordinary]
    tok = Tokenizer(ByteLevel(byte_level(special, ordinary)), GLM4_HF)
    text = "<|user|>" * 3 + "<|assistant|><sop>"
    for asked in (tok, Tokenizer(tok._pieces, GLM4_HF, {"default": ECHO})):
        ids = asked.chat(user(text))
        assert ids.count(tok.id("<|user|>")) == ids.count(tok.id("<sop>")) == ids.count(tok.id("<|assistant|>")) == 1
        assert text in tok.decode(ids)


def test_other_tokens_are_the_models_to_read(echo: Tokenizer) -> None:
    assert echo.id("<think>") in echo.chat(user("a", "<think>b", "c"))


def test_metadata_and_tools_are_text_too() -> None:
    tok = official("chatglm3-6b")
    tool = [{"name": "<|user|>", "description": "<|observation|>"}]
    call = {"role": "assistant", "metadata": "<|system|>", "content": "<|user|>"}
    ids = tok.chat([*ASK, call, {"role": "observation", "content": "<|assistant|>"}], tool)
    roles = [tok.piece(id) for id in ids if id >= 64789]
    assert roles == ["[gMASK]", "sop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|assistant|>"]


def test_splitting_prefers_the_longer_token() -> None:
    assert split("a<s><sop>b", ["<s>", "<sop>", "<s><sop"]) == ["a", Token("<s><sop"), ">b"]
    assert split("", ["x"]) == []
    assert split("abc", []) == ["abc"]


# ---------------------------------------------------------------- templates in their sandbox


def render(template: str, messages: list | None = None, tools: list | None = None, **options: Any) -> str:
    turns = conversation(messages or ASK, tools, **options)
    return shown(rendered(template, turns, ADDED, ADDED, eos_token="<|endoftext|>"))


@pytest.mark.parametrize(("template", "expected"), [
    ("{{ messages[0].content }}{{ eos_token }}", "你好<|endoftext|>"),
    ("{{ [1, {'a': '<é>'}] | tojson }}", '[1, {"a": "<é>"}]'),
    ("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 2,\n "b": 1\n}'),
    ("{{ 'é' | tojson(ensure_ascii=true) }}", '"\\u00e9"'),
    ("{{ strftime_now('%Y') | length }}", "4"),
    ("a{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "a01"),
    ("{% generation %}x{{ add_generation_prompt }}{% endgeneration %}", "xTrue"),
    ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),
    ("{% set ns = namespace(n=1) %}{% set ns.n = 2 %}{{ ns.n }}", "2"),
    ("{{ tools is none }}{{ enable_thinking is defined }}", "TrueFalse"),
    ("{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(messages | length) }}", "[1]"),
    ("\ue000{{ messages[0].content }}", "\ue000你好"),
    ("", ""),
])  # fmt: skip
def test_what_templates_can_do(template: str, expected: str) -> None:
    assert render(template) == expected


@pytest.mark.parametrize(("template", "reason"), [
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("{% if %}", "Expected an expression"),
    ("{{ messages[0].nothing.at_all }}", "no attribute 'nothing'"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    ("{{ cycler.__init__.__globals__ }}", "unsafe"),
    ("{{ messages.append(1) }}", "unsafe"),
    ("{{ messages[0].update({'role': 'system'}) }}", "unsafe"),
    ("{% include '/etc/passwd' %}", "no loader"),
    ("{% import 'os' as os %}", "no loader"),
    ("{{ 1 // 0 }}", "by zero"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ("{{ " + "(" * 20_000 + ")" * 20_000 + " }}", "chat template failed"),
])  # fmt: skip
def test_what_templates_cannot_do(template: str, reason: str) -> None:
    with pytest.raises(PromptError, match=reason):
        render(template)
    assert render("fine") == "fine"


GREEDY = {
    "loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "range": "{% for a in range(10 ** 12) %}{% endfor %}",
    "text": "{{ 'x' * 10 ** 10 }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "list": "{{ (range(99999) | list) * 10 ** 7 }}",
    "padding": "{{ 'x' | center(10 ** 10) }}",
    "format": "{{ '%9999999999d' | format(1) }}",
    "str.format": "{{ '{:>9999999999}'.format(1) }}",
    "doubling": "{% set n = namespace(x='xx') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "output": "{% for i in range(99999) %}{{ 'y' * 10000 }}{% endfor %}",
    "lipsum": "{{ lipsum(n=10 ** 8) }}",
    "indent": "{{ messages | tojson(indent=10 ** 9) }}",
    "replace": "{{ ('a' * 10 ** 5) | replace('a', 'b' * 10 ** 6) }}",
    "sort": "{% for a in range(99999) %}{{ range(99999) | sort | length }}{% endfor %}",
    "swallowed": "{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}",
}


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    box = Sandbox()
    assert "text" in box.ask("started", {})
    yield box
    box.close()


@pytest.mark.parametrize("case", GREEDY)
def test_greedy_templates_are_stopped(sandbox: Sandbox, case: str) -> None:
    start = time.perf_counter()
    reply = sandbox.ask(GREEDY[case], {"messages": ASK}, seconds=0.5)
    assert list(reply) == ["error"]
    assert time.perf_counter() - start < 2.5
    assert sandbox.ask("{{ a }}", {"a": "fine"})["text"] == "fine"


def test_the_budget_reaches_the_user(monkeypatch: pytest.MonkeyPatch, echo: Tokenizer) -> None:
    tok = Tokenizer(echo._pieces, GLM4_HF, {"default": GREEDY["loop"]})
    start = time.perf_counter()
    with pytest.raises(PromptError, match="took more than 3 s"):
        tok.chat(ASK)
    assert time.perf_counter() - start < 6


def test_templates_are_fast(echo: Tokenizer) -> None:
    messages = user(*["What is attention? 什么是注意力？"] * 21)
    echo.chat(messages)  # starts the worker
    times = []
    for _ in range(15):
        start = time.perf_counter()
        echo.chat(messages)
        times.append(time.perf_counter() - start)
    assert statistics.median(times) < 0.05


def test_a_long_conversation_fits_the_budget(echo: Tokenizer) -> None:
    assert len(echo.prompt(user("word " * 600_000))) > 3_000_000


def test_the_worker_is_replaced_when_it_dies(sandbox: Sandbox) -> None:
    assert sandbox._worker is not None
    sandbox._worker.kill()
    sandbox._worker.wait()
    assert sandbox.ask("{{ 1 + 1 }}", {}) == {"text": "2"}
    sandbox.close()
    assert sandbox.ask("{{ 1 + 1 }}", {"x": 1}) == {"text": "2"}


def test_an_interrupted_worker_is_not_used_again(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("glm.sandbox._exchange", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sandbox.ask("{{ a }}", {"a": "first"})
    assert sandbox.ask("{{ a }}", {"a": "second"}) == {"text": "second"}


def test_a_worker_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/no/such/python")
    assert Sandbox().ask("x", {}) == {"error": "the worker process for templates did not start"}


def test_threads_do_not_mix_up_their_prompts(echo: Tokenizer) -> None:
    wrong: list[str] = []

    def ask(name: str) -> None:
        for n in range(20):
            text = echo.prompt(user(f"{name}{n}"))
            if f"<|user|>\n{name}{n}" not in text:
                wrong.append(text)

    threads = [threading.Thread(target=ask, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_half_a_surrogate_pair_passes_the_sandbox_and_is_refused_after_it(echo: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="surrogate"):
        echo.chat(user("\ud800"))


# ---------------------------------------------------------------- which template


def test_templates_by_name(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(byte_level(list(ADDED)))
    listed = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools {{ tools | length }}"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": listed}))
    tok = Tokenizer.from_pretrained(tmp_path)
    assert tok.prompt(ASK) == "plain"
    assert tok.prompt(ASK, [WEATHER, WEATHER]) == "tools 2"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert Tokenizer.from_pretrained(tmp_path).prompt(ASK) == "file"


def test_a_template_that_reads_tools_in_messages_gets_them_there() -> None:
    inside = (
        "{% for m in messages %}{{ m.role }}:{% if m.tools is defined %}{{ m.tools | length }}{% endif %};{% endfor %}"
    )
    assert render(inside, ASK, [WEATHER]) == "system:1;user:;"
    assert render(inside, [{"role": "system", "content": "s"}, *ASK], [WEATHER]) == "system:1;user:;"
    assert render(inside + "{{ tools | length }}", ASK, [WEATHER]) == "user:;1"
    with pytest.raises(PromptError, match="no place for tools"):
        render("{% for m in messages %}{{ m.content }}{% endfor %}", ASK, [WEATHER])


@pytest.mark.parametrize("format", [CHATGLM_BYTES])
def test_releases_that_never_read_a_template_do_not(format: Any) -> None:
    tok = Tokenizer(ByteLevel(byte_level(TINY)), format, {"default": "never"})
    assert "never" not in tok.prompt(ASK)


# ---------------------------------------------------------------- messages that are none


@pytest.mark.parametrize(("messages", "message"), [
    ([], "no message"),
    ("hello", "must be a list"),
    ({"role": "user", "content": "x"}, "must be a list"),
    (["hello"], "message 1 is a str"),
    ([{"content": "x"}], "message 1: role None"),
    ([*ASK, {"role": "assitant", "content": "x"}], "message 2: role 'assitant' is none of system, user"),
    ([{"role": ["user"], "content": "x"}], "role"),
    ([{"role": "user"}], "content must be a string"),
    ([{"role": "user", "content": 3}], "content must be a string"),
    ([{"role": "user", "content": [{"type": "image"}]}], "reads only text"),
])  # fmt: skip
def test_bad_messages(messages: Any, message: str) -> None:
    tok = Tokenizer(Ranks(ranks([]), numbered(256)), GLM4)
    with pytest.raises(PromptError, match=message):
        tok.chat(messages)


@pytest.mark.parametrize("format", [CHATGLM, CHATGLM2])
@pytest.mark.parametrize("messages", [
    [{"role": "system", "content": "s"}, *ASK], user("a", "b"), [*ASK, *ASK], [{"role": "assistant", "content": "a"}],
])  # fmt: skip
def test_rounds_take_turns(format: Any, messages: list) -> None:
    with pytest.raises(PromptError, match="only user and assistant messages, in turn"):
        format.prompt(conversation(messages))


@pytest.mark.parametrize("format", [CHATGLM, CHATGLM2])
def test_rounds_have_no_tools(format: Any) -> None:
    with pytest.raises(PromptError, match="no prompt with tools"):
        format.prompt(conversation(ASK, [WEATHER]))
    with pytest.raises(PromptError, match="without a place for the answer"):
        format.prompt(conversation(ASK, reply=False))


def test_roles_a_release_does_not_know() -> None:
    tool = [*ASK, {"role": "tool", "content": "x"}]
    for format in (CHATGLM3, GLM4, GLM_Z1):
        with pytest.raises(PromptError, match="observation"):
            format.prompt(conversation(tool))
    with pytest.raises(PromptError, match="knows no 'observation' role"):
        GLM4_MOE.prompt(conversation([*ASK, {"role": "observation", "content": "x"}]))
    assert render("{{ messages[1].role }}", tool) == "tool"


def test_tools_that_are_none() -> None:
    loop: dict[str, Any] = {}
    loop["itself"] = loop
    for tools in (["get_weather"], [{"function": "get_weather"}]):
        with pytest.raises(PromptError, match="tools: each must be the mapping"):
            conversation(ASK, tools)  # type: ignore[arg-type]
    for tools in ([{"f": object()}], [loop]):
        with pytest.raises(PromptError, match="plain JSON"):
            conversation(ASK, tools)
    with pytest.raises(PromptError, match="tools of message 1: not a list"):
        conversation([{"role": "system", "content": "", "tools": "all"}])
    deep: Any = "x"
    for _ in range(700):
        deep = {"d": deep}
    with pytest.raises(PromptError, match=r"deep|plain JSON|recursion"):
        render("{{ tools | tojson }}", ASK, [deep])


json_data = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.sampled_from(["user", "function", "text"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.fixed_dictionaries({"role": st.sampled_from(chat.ROLES)}, optional=dict.fromkeys(KEYS, json_data))),
    st.lists(json_data, max_size=2),
)
def test_any_json_is_a_prompt_or_one_clear_error(messages: list, tools: list) -> None:
    for format in FORMATS:
        with contextlib.suppress(PromptError):
            assert shown(format.prompt(conversation(messages, tools)))


def test_content_in_parts() -> None:
    parts = [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]
    for format in FORMATS:
        assert format.prompt(conversation([{"role": "user", "content": parts}])) == format.prompt(conversation(ASK))


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize(("format", "text", "expected"), [
    (CHATGLM, " 你好,世界!\n", {"content": "你好，世界！"}),
    (CHATGLM, "训练到[[训练时间]]:1,000; ok? 好?", {"content": "训练到2023年：1,000; ok? 好？"}),
    (CHATGLM, "中,文,;a,b", {"content": "中，文，;a,b"}),
    (CHATGLM2, " [[训练时间]],你好 ", {"content": "2023年,你好"}),
    (CHATGLM3, "\n 你好\n再见", {"metadata": "", "content": "你好\n再见"}),
    (CHATGLM3, "你好", {"metadata": "", "content": "你好"}),
    (CHATGLM3, "Well, yes.\nNo.", {"metadata": "", "content": "Well, yes.\nNo."}),
    (CHATGLM3, "text-to-speech\n```python\nf()\n```", {"metadata": "text-to-speech", "content": "```python\nf()\n```"}),
    (GLM4, "get_weather\n{\"city\": \"北京\"}", {"metadata": "get_weather", "content": "{\"city\": \"北京\"}"}),
    (GLM4, "", {"metadata": "", "content": ""}),
])  # fmt: skip
def test_answers(format: Any, text: str, expected: dict) -> None:
    assert format.answer(text) == [{"role": "assistant", **expected}]


def test_an_answer_may_be_several_messages() -> None:
    tok = Tokenizer(Ranks(ranks([]), numbered(256)), GLM4)
    text = "\nI look it up.<|assistant|>get_weather\n{}"
    spoken = {"role": "assistant", "metadata": "", "content": "I look it up."}
    call = {"role": "assistant", "metadata": "get_weather", "content": "{}"}
    ids = [*tok.encode(text), tok.id("<|observation|>"), *tok.encode("never read")]
    assert tok.replies(text) == tok.replies(ids) == [spoken, call]
    assert tok.parse(ids) == call
    # What was said can go back into the conversation as it is.
    turns = [*ASK, spoken, call, {"role": "observation", "content": "晴"}]
    assert tok.prompt(turns, add_generation_prompt=False) == (
        "[gMASK]<sop><|user|>\n你好<|assistant|>\nI look it up.<|assistant|>get_weather\n{}<|observation|>\n晴"
    )


def test_every_format_is_complete() -> None:
    for format in FORMATS:
        assert format.name
        assert shown(format.prompt(conversation(ASK)))
        assert [message["role"] for message in format.answer("x")] == ["assistant"]
