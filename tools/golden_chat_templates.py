#!/usr/bin/env python3
"""Writes tests/golden/chat/templates.json: chat templates in the style of well-known models, and what transformers
renders of them. Writes tests/golden/chat/tokens.json too: ids and labels that transformers makes of conversations, by
`apply_chat_template` of tokenizers and, for LLaVA, of its processor; labels by the masks of its tag `generation`.

Made with transformers 5.24.0, tokenizers 0.23.3, jinja2 3.1.6 and pillow 13.0.0. Run from the repository's root: python tools/golden_chat_templates.py
"""

import json
from pathlib import Path

import jinja2
import tokenizers
import transformers
from PIL import Image
from transformers.utils.chat_template_utils import render_jinja_template

OUT = Path("tests/golden/chat/templates.json")
TOKENS = Path("tests/golden/chat/tokens.json")
SMOLLM = Path("tests/golden/built_tokenizers/smollm.json")
PARITY = Path("tests/golden/parity")

CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You answer briefly.<|im_end|>
' }}{% endif %}{{ '<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

LLAMA_2 = """{% if messages[0]['role'] == 'system' %}
{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}
{% else %}
{% set loop_messages = messages %}{% set system_message = false %}
{% endif %}
{% for message in loop_messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate: user, assistant, user, assistant') }}
    {% endif %}
    {% if loop.index0 == 0 and system_message != false %}
        {% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}
    {% else %}
        {% set content = message['content'] %}
    {% endif %}
    {% if message['role'] == 'user' %}
{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}
{{ ' ' + content.strip() + ' ' + eos_token }}
    {%- endif %}
{% endfor %}"""

LLAMA_3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {%- for call in message.tool_calls %}
            {{- '{"name": "' + call.function.name + '", "parameters": ' + call.function.arguments | tojson + '}' }}
        {%- endfor %}
        {{- "<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" + message.content | tojson(indent=2) + "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("After the optional system message, roles must alternate user/assistant") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.first and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + " [/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + " [/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported") }}
    {%- endif %}
{%- endfor %}
"""

LLAVA = """{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}\
{# Pictures first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}\
{% endfor %}{# then text #}{% if message['role'] != 'assistant' %}\
{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}\
{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}\
{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""

# Things that templates do with Python's methods, filters and loop controls.
PYTHON = """{%- macro heading(role) %}{{ role.title() }}{% endmacro %}
{%- for message in messages %}
    {%- if message.content.startswith('skip') %}
        {%- continue %}
    {%- endif %}
    {%- if message.content == 'stop' %}
        {%- break %}
    {%- endif %}
    {{- heading(message.role) ~ ' (' ~ loop.index ~ '): ' }}
    {%- for key, value in message.items() %}
        {{- key ~ '=' ~ value | string | length }}{{ ', ' if not loop.last }}
    {%- endfor %}
    {{- '\\n' + message.content.strip().replace('a', 'A').split(' ')[-1] + '\\n' }}
    {{- none }} {{ true }} {{ [1, 'x', 2.5] }} {{ message | tojson }}
{% endfor %}
{{- strftime_now('%Y') | length }}{% if add_generation_prompt %}Assistant:{% endif %}
"""

# Writes only the last answer's thoughts, so that a text for fewer messages is not the beginning of that for more.
FORGETFUL = """{% for message in messages %}{{ message.role }}: {{ message.content.split('</think>')[-1] \
if not loop.last else message.content }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""

TALK = [("user", "What is\\nthis?"), ("assistant", "  A red bus, or \"two\".  "), ("user", " Why? "), ("assistant", "Größe 大 🙂")]
SYSTEM = [("system", " Be kind. ")]
TOOLS = [{"role": "user", "content": "Sum"}, {"role": "assistant", "tool_calls": [
    {"function": {"name": "add", "arguments": {"b": [1, 2.5, None], "a": {"<x>": True}, "c": "é'\"\n"}}}]},
    {"role": "tool", "content": {"z": [], "y": {}, "x": [1, {"w": "é"}]}}]
IMAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
          {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
          {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
          {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]}]


def plain(turns):
    return [{"role": role, "content": text} for role, text in turns]


def template(name, source, conversations, bos="<s>", eos="</s>"):
    tokens = {"bos_token": bos, "eos_token": eos}
    cases = []
    for messages in conversations:
        for prompt in (False, True):
            case = {"messages": messages, "add_generation_prompt": prompt}
            try:
                rendered, spans = render_jinja_template(
                    conversations=[messages], chat_template=source, add_generation_prompt=prompt,
                    return_assistant_tokens_mask="endgeneration" in source and not prompt, **tokens)
                case["text"] = rendered[0]
                if spans and spans[0]:
                    case["generation"] = [[len(rendered[0][:at].encode()) for at in span] for span in spans[0]]
            except jinja2.exceptions.TemplateError as error:
                case["error"] = str(error)
            cases.append(case)
    return {"name": name, "template": source, "tokens": tokens, "cases": cases}


# Templates for training: what the assistant generates stands in the tag, up to and with the token that ends it.
TRAINED = {
    "chatml": """{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant
' }}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '
' }}{% else %}{{ '<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}""",
    # Answers end with one token, the whole conversation with another.
    "two_ends": """{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant
' }}{% generation %}{{ message['content'] | trim + '<|im_end|>' }}{% endgeneration %}{{ '
' }}{% else %}{{ '<|im_start|>' + message['role'] + '
' + message['content'] | trim + '<|im_end|>' + '
' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% else %}{{ '<|endoftext|>' }}{% endif %}""",
    # The last answer has its thoughts, earlier ones have none.
    "thoughts": """{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant
' }}{% generation %}{% if loop.last %}{{ '<think>

</think>

' }}{% endif %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '
' }}{% else %}{{ '<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}""",
    "llama_2": """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}
{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}
{% for message in loop_messages %}{% if loop.index0 == 0 and system_message != false %}
{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}
{% else %}{% set content = message['content'] %}{% endif %}
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{%- else %}{% generation %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endgeneration %}{% endif %}{% endfor %}""",
    "mistral": """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}
{{- '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{% generation %}{{ ' ' + message['content'] | trim + eos_token }}{% endgeneration %}{% endif %}{% endfor %}""",
    # Writes no BOS, though the tokenizer has one.
    "zephyr": """{% for message in messages %}{{ '<|' + message['role'] + '|>
' }}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{% else %}{{ message['content'] + eos_token }}{% endif %}{{ '
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>
' }}{% endif %}""",
    "llava": """{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ':' }}{% endif %}\
{% if message['role'] == 'assistant' %}{% generation %}{% for content in message['content'] %}{{ ' ' + content['text'] + eos_token }}{% endfor %}{% endgeneration %}\
{% else %}{{ ' ' }}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}\
{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}""",
    "llava_bos": """{{ bos_token }}{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for content in message['content'] %}\
{% if content['type'] == 'image' %}{{ '<image>' }}{% elif message['role'] == 'assistant' %}{% generation %}{{ content['text'] + eos_token }}{% endgeneration %}\
{% else %}{{ content['text'] + '\\n' }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}""",
}


def smollm(eos):
    """The small byte-level vocabulary, as its GGUF metadata describe it."""
    from tokenizers import pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

    vocabulary = json.loads(SMOLLM.read_text())["vocabulary"]
    described = {"tokenizer_type": "gpt2", "pre_tokenizer_type": "smollm", "token_type": vocabulary["token_types"],
                 "tokens": vocabulary["tokens"], "merges": vocabulary["merges"]}
    inner, _ = convert_gguf_tokenizer("llama", described)
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    special = [token for token, kind in zip(vocabulary["tokens"], vocabulary["token_types"]) if kind == 3]
    inner.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in special])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<|im_start|>", eos_token=eos)


def record(turns, system=None):
    """The conversation as a record of a data set; a turn that begins with `<image>` shows a picture."""
    messages = [{"role": "system", "content": system}] if system else []
    return {"messages": messages + [{"role": role, "content": text} for role, text in turns]}


def encoded(apply, messages):
    """Ids and labels for training, and the ids of the prompt for the last answer."""
    whole = apply(messages, add_generation_prompt=False, return_assistant_tokens_mask=True)
    prompt = apply(messages[:-1], add_generation_prompt=True)
    flat = lambda ids: ids[0] if isinstance(ids[0], list) else ids
    ids, mask = flat(whole["input_ids"]), flat(whole["assistant_masks"])
    return ids, [id if learned else -100 for id, learned in zip(ids, mask)], flat(prompt["input_ids"])


def joined(ids, labels, image):
    """One -200 for all the positions of a picture."""
    kept = [at for at, id in enumerate(ids) if id != image or at == 0 or ids[at - 1] != image]
    return [-200 if ids[at] == image else ids[at] for at in kept], [labels[at] for at in kept]


def by_tokenizer(name, tokenizer, template, turns, system=None):
    apply = lambda messages, **options: tokenizer.apply_chat_template(
        messages, chat_template=TRAINED[template], tokenize=True, return_dict=True, **options)
    conversation = record(turns, system)
    ids, labels, prompt = encoded(apply, conversation["messages"])
    tokens = {key: getattr(tokenizer, key) for key in ("bos_token", "eos_token")}
    return {"tokenizer": name, "template": template, "source": TRAINED[template], "tokens": tokens, "sees": False,
            "record": conversation, "ids": ids, "labels": labels, "prompt": prompt}


def by_processor(name, template, turns):
    """A LLaVA's processor; every picture takes four positions."""
    folder = PARITY / name / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    size = {"height": 4, "width": 4}
    pictures = transformers.CLIPImageProcessor(do_resize=False, do_center_crop=False, size=size, crop_size=size)
    processor = transformers.LlavaProcessor(
        image_processor=pictures, tokenizer=tokenizer, patch_size=2, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=TRAINED[template])
    apply = lambda messages, **options: processor.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    messages = []
    for role, text in turns:
        shown = text.startswith("<image>\n")
        picture = [{"type": "image", "image": Image.new("RGB", (4, 4))}] if shown else []
        messages.append({"role": role, "content": picture + [{"type": "text", "text": text.removeprefix("<image>\n")}]})
    conversation = record(turns)
    conversation["images"] = ["x.png"] * sum(text.startswith("<image>") for _, text in turns)
    image = tokenizer.convert_tokens_to_ids("<image>")
    ids, labels, prompt = encoded(apply, messages)
    ids, labels = joined(ids, labels, image)
    prompt, _ = joined(prompt, prompt, image)
    tokens = {key: getattr(tokenizer, key) for key in ("bos_token", "eos_token")}
    return {"tokenizer": name, "template": template, "source": TRAINED[template], "tokens": tokens, "sees": True,
            "record": conversation, "ids": ids, "labels": labels, "prompt": prompt}


def tokenised():
    """Conversations with white space round their texts, other scripts, and texts that look like tokens."""
    talk = [("user", " What is\nthis? "), ("assistant", "  A red bus, 12 of them. "), ("user", "Größe 大 🙂?"), ("assistant", "two </s> ends")]
    clean = [(role, text.strip()) for role, text in talk]
    small, other = smollm("<|im_end|>"), smollm("<|endoftext|>")
    cases = []
    for template in ("chatml", "two_ends", "thoughts"):
        for tokenizer in (small, other):
            cases.append(by_tokenizer("smollm", tokenizer, template, talk if template != "thoughts" else clean))
        cases.append(by_tokenizer("smollm", small, template, clean[:2], "Be kind."))
    for name in ("mha_untied_mlp", "gqa_tied_mlp_vision"):
        llama = transformers.AutoTokenizer.from_pretrained(PARITY / name / "model")
        for template in ("llama_2", "mistral", "zephyr"):
            cases.append(by_tokenizer(name, llama, template, talk[:3] + [("assistant", "two ends")]))
        cases.append(by_tokenizer(name, llama, "llama_2", talk[:2], "Be kind."))
        shown = [("user", "<image>\nWhat is it?"), ("assistant", "A red bus."), ("user", "Why?"), ("assistant", "It is red.")]
        both = [("user", "<image>\nWhat is it?"), ("assistant", "A bus."), ("user", "<image>\nAnd now?"), ("assistant", "A cat.")]
        for template in ("llava", "llava_bos"):
            cases += [by_processor(name, template, shown), by_processor(name, template, both), by_processor(name, template, shown[2:])]
    return cases


def main():
    versions = {"transformers": transformers.__version__, "tokenizers": tokenizers.__version__}
    TOKENS.write_text(json.dumps({"versions": versions, "cases": tokenised()}, ensure_ascii=False) + "\n")
    talks = [plain(TALK), plain(SYSTEM + TALK[:2]), plain(TALK[:1]), plain(TALK[:3])]
    wrong = plain([TALK[0], TALK[0]])
    templates = [
        template("chatml", CHATML, talks, "<|im_start|>", "<|im_end|>"),
        template("llama_2", LLAMA_2, talks + [wrong]),
        template("llama_3", LLAMA_3, talks + [TOOLS], "<|begin_of_text|>", "<|eot_id|>"),
        template("mistral", MISTRAL, talks + [wrong]),
        template("llava", LLAVA, [IMAGES, IMAGES[:1]]),
        template("python", PYTHON, [plain([("user", "skip this"), ("user", "say a word"), ("assistant", " 'tis a bAnana "),
                                           ("user", "stop"), ("assistant", "never")])]),
        template("forgetful", FORGETFUL, [plain([("user", "q"), ("assistant", "<think>x</think>a"), ("user", "r"),
                                                 ("assistant", "b")])]),
    ]
    OUT.parent.mkdir(parents=True, exist_ok=True)
    versions = {"transformers": transformers.__version__, "jinja2": jinja2.__version__}
    OUT.write_text(json.dumps({"versions": versions, "templates": templates}, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
