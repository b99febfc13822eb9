"""A byte-level BPE tokenizer trained on the world's language: every word is one token, and any text can be encoded."""

from itertools import islice

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from aspo.world.clip import BOS, EOS, IMAGE, PAD, SPECIAL_TOKENS
from aspo.world.language import DESCRIBE, questions, true_sentences
from aspo.world.scenes import scenes

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'].upper() + ':\\n' }}"
    "{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{% if content is string %}{{ content }}"
    "{% else %}{% for part in content %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ eos_token }}{% endgeneration %}"
    "{% elif content is string %}{{ content + '\\n' }}"
    "{% else %}{% for part in content %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:\\n' }}{% endif %}"
)
"""<s>USER:\\n<image>Describe the picture.\\nASSISTANT:\\nThe circle is red.</s>

The tokenizer itself adds no special tokens, so text made by the template is encoded as it stands. The line break before
the answer keeps the answer's tokens the same whether it is encoded alone or after the prompt.
"""


def train_tokenizer(examples: int = 3000) -> PreTrainedTokenizerFast:
    """Train on what can be said of the first base scenes (the same every time)."""
    texts = ["SYSTEM:\nUSER:\nNo.\nASSISTANT:\nYes.", f"{DESCRIBE}\n", " It is large."]
    for scene in islice(scenes("base"), examples):
        sentences = true_sentences(scene)
        texts += [*sentences, " " + " ".join(sentences), *(question for question, _ in questions(scene))]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=4096,  # an upper bound: merging ends when every word is one token
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[IMAGE],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def clip_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same vocabulary as CLIP's text tower wants it: <s> text </s>, padded on the right."""
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A {EOS}", special_tokens=[(t, SPECIAL_TOKENS.index(t)) for t in (BOS, EOS)]
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=BOS, eos_token=EOS, pad_token=PAD, padding_side="right"
    )
