"""`moe-hf push`: put an export on the model hub, in one commit that is checked afterwards."""

import argparse


def add_parser(commands) -> None:
    """Declare the subcommand and its arguments."""
    parser = commands.add_parser(
        "push",
        help="put an export on the model hub, in one commit that is checked afterwards",
        description="The login is that of `hf auth login` or HF_TOKEN, the hub that of HF_ENDPOINT.",
    )
    parser.add_argument("folder", metavar="DIR", help="folder of an export, such as OUTPUT_DIR/hf of a run")
    parser.add_argument("repo_id", metavar="ORG/NAME", help="repository, created if it is not there")
    parser.add_argument("--private", action="store_true", help="create it private, and refuse one that is public")
    parser.add_argument("--revision", help="branch to push to, created if it is not there (default: main)")
    parser.add_argument("--commit-message", help="summary of the commit (default: Upload model)")
    parser.add_argument("--license", help="identifier for the model card, such as apache-2.0")
    parser.set_defaults(run=_push)


def _push(arguments: argparse.Namespace) -> None:
    from ..checkpoint.hub import push_export

    pushed = push_export(
        arguments.folder,
        arguments.repo_id,
        private=arguments.private or None,
        revision=arguments.revision,
        commit_message=arguments.commit_message,
        license=arguments.license,
    )
    if pushed.left_out:
        print(f"not part of the export, left out: {', '.join(pushed.left_out)}")
    print(f"pushed {len(pushed.files)} files to {pushed.url}, commit {pushed.commit}")
