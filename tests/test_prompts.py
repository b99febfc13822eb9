"""Prompts through chat templates that are particular about their messages."""

import aspo  # noqa: F401  first: it makes torchvision importable on a CPU torch

# isort: split
import copy

import pytest
from tiny import tiny_image, tiny_llava
from transformers import AutoProcessor

from aspo.prompts import encode_prompt, generation_inputs

GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {{ '<start_of_turn>' + message['role'] + '\n' + (first_user_prefix if loop.first else "") }}
    {%- for item in message['content'] -%}
        {{ '<image>' if item['type'] == 'image' else item['text'] | trim }}
    {%- endfor -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\n'}}
{%- endif -%}"""


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    found = copy.deepcopy(AutoProcessor.from_pretrained(tiny_llava(tmp_path_factory.mktemp("prompts") / "llava")))
    found.chat_template = GEMMA
    return found


def said(role, text):
    return {"role": role, "content": text}


def test_an_empty_system_message_is_one_with_an_empty_text(processor):
    user = said("user", "Describe it.")
    texts = [encode_prompt(processor, prompt, [tiny_image()]).text for prompt in ([user], [said("system", ""), user])]
    assert texts[1] == texts[0].replace("user\n", "user\n\n\n", 1)


def test_what_a_template_refuses_is_told_with_the_row(processor):
    row = {"id": "twice", "prompt": [said("user", "One."), said("user", "Two.")], "images": [tiny_image()]}
    with pytest.raises(ValueError, match=r"twice.*refuses messages of user, user: Conversation roles must alternate"):
        generation_inputs(processor, [row])
