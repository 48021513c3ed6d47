"""The command line: planmoe's flags, and what becomes of them in Megatron's arguments."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable
from typing import Any

from planmoe_ds.config import PlanMoEConfig, json_or_text, parse_config, read_section
from planmoe_ds.errors import PlanMoEConfigError
from planmoe_ds.integrations.megatron_limits import problems_of

DISPATCHER = "moe_token_dispatcher_type"
ALIAS = "--moe-token-dispatcher"
FILE_FLAG = "--planmoe-config"
SETTINGS = {  # flag -> key of PlanMoEConfig
    f"--planmoe-{key.replace('_', '-')}": key for key in PlanMoEConfig.model_fields if key != "enabled"
}
SHARED = (  # of Megatron's own: ranks that disagree on them hang without a word
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size",
    "expert_model_parallel_size", "expert_tensor_parallel_size", "num_layers", "hidden_size", "num_experts",
    "moe_router_topk", "seq_length", "micro_batch_size", "global_batch_size", "bf16", "fp16",
    "use_distributed_optimizer", "recompute_granularity",
)  # fmt: skip


def with_flags(add_megatron_arguments: Callable[..., Any]) -> Callable[..., Any]:
    """Let the parser know planmoe as a dispatcher, and its settings."""

    def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = add_megatron_arguments(parser)
        action = next((action for action in parser._actions if action.dest == DISPATCHER), None)
        if action is None:
            raise ImportError(f"Megatron's parser has no --{DISPATCHER.replace('_', '-')}: nowhere to add planmoe")
        action.choices = [*(action.choices or []), "planmoe"]
        action.option_strings = [*action.option_strings, ALIAS]
        parser._option_string_actions[ALIAS] = action
        group = parser.add_argument_group("planmoe", f"for {ALIAS} planmoe")
        group.add_argument(FILE_FLAG, help="JSON or YAML file of settings; the flags below override it")
        for flag, key in SETTINGS.items():
            group.add_argument(flag, type=json_or_text, help=PlanMoEConfig.model_fields[key].description)
        _check_spelling(sys.argv[1:])
        return parser

    return add_arguments


def with_choice(parse_args: Callable[..., Any]) -> Callable[..., Any]:
    """Check planmoe's part of the arguments as soon as they are parsed, and set args.planmoe."""

    def parse(*args: Any, **kwargs: Any) -> Any:
        parsed = parse_args(*args, **kwargs)
        read_choice(parsed)
        return parsed

    return parse


def read_choice(args: Any) -> None:
    """Set args.planmoe to the section of settings, True without any, None when off, and the dispatcher to "alltoall".

    Raises PlanMoEConfigError that names everything that is wrong.
    """
    chosen = [p for p in (args, getattr(args, "language_model", None)) if getattr(p, DISPATCHER, None) == "planmoe"]
    given = {key: value for flag, key in SETTINGS.items() if (value := getattr(args, _name(flag), None)) is not None}
    path = getattr(args, _name(FILE_FLAG), None)
    if not chosen:
        if given or path is not None:
            flags = ([FILE_FLAG] if path else []) + [flag for flag, key in SETTINGS.items() if key in given]
            raise PlanMoEConfigError(f"{', '.join(flags)} without {ALIAS} planmoe: add it, or leave these out")
        args.planmoe = None
        return
    for place in chosen:
        setattr(place, DISPATCHER, "alltoall")  # Megatron knows what goes with it by this name
    section = {**({} if path is None else read_section(path, FILE_FLAG)), **given} or True
    parse_config(section, "planmoe")
    _check_arguments(_flat(args))
    args.planmoe = section


def shared_settings(args: Any) -> dict[str, str]:
    """What every rank must have in common, by flag."""
    flat = _flat(args)
    return {f"--{name.replace('_', '-')}": str(getattr(flat, name, None)) for name in SHARED}


def _flat(args: Any) -> argparse.Namespace:
    """Arguments by the names of the command line; YAML nests them, and calls one as the config does."""
    parts = [getattr(args, name, None) for name in ("model_parallel", "language_model")]
    nested = {key: value for part in parts if part is not None for key, value in vars(part).items()}
    return argparse.Namespace(**{"num_experts": nested.get("num_moe_experts"), **nested, **vars(args)})


def _check_arguments(args: Any) -> None:
    problems = problems_of(args)
    num_experts, size = getattr(args, "num_experts", None), getattr(args, "expert_model_parallel_size", 1)
    if num_experts is None and not getattr(args, "use_checkpoint_args", False):
        problems.append("no MoE layer in the model: give --num-experts, or leave --moe-token-dispatcher planmoe out")
    elif num_experts is not None and num_experts % size:
        problems.append(
            f"--expert-model-parallel-size {size} does not divide --num-experts {num_experts}: every rank must hold "
            "the same number of experts"
        )
    if problems:
        raise PlanMoEConfigError(f"{ALIAS} planmoe does not work with these arguments:\n  " + "\n  ".join(problems))


def _check_spelling(arguments: list[str]) -> None:
    known = [FILE_FLAG, *SETTINGS]
    for argument in arguments:
        flag = argument.split("=")[0]
        if flag.startswith("--planmoe") and flag not in known:
            nearest = difflib.get_close_matches(flag, known, n=1, cutoff=0.4)
            hint = f"did you mean {nearest[0]}? " if nearest else ""
            raise PlanMoEConfigError(f"unknown argument {flag}; {hint}known: {', '.join(known)}")


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")
