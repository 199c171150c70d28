"""Publish a trained adapter: weights, tokenizer, model card and charts in one commit, and load it from there.

    python examples/push_to_hub.py --adapter qwen-dpo --repo_id me/qwen-dpo

Log in first, with `hf auth login` or by `HF_TOKEN`. The repository is private unless `--public` is given.
"""

import argparse

from qlora_dpo import load_policy, push_adapter


def main() -> None:
    """Push, and see that what was pushed loads."""
    parser = argparse.ArgumentParser(description="Publish an adapter on the Hub")
    parser.add_argument("--adapter", required=True, help="folder of a training run")
    parser.add_argument("--repo_id", required=True)
    parser.add_argument("--public", action="store_true")
    options = parser.parse_args()

    commit = push_adapter(options.adapter, options.repo_id, private=not options.public)
    print(f"pushed: {commit.commit_url}")
    policy = load_policy(f"{commit.repo_url.repo_id}@{commit.oid}")
    print(f"loaded from there: adapter {policy.active_adapter!r} on {policy.get_base_model().name_or_path}")


if __name__ == "__main__":
    main()
