"""ASPO inside ms-swift: `swift rlhf --rlhf_type dpo --external_plugins examples/ms_swift_plugin.py
--remove_unused_columns false ...`, on rows with chosen_sentences and chosen_similarity."""

from aspo.integrations import ms_swift

ms_swift.register("aspo", alpha=0.5)
