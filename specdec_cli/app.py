"""The commands and their arguments, grouped as `--help` shows them. Nothing here imports torch.

A command runs `run(options)` of the module of specdec_cli that is named after it; options hold its arguments by name.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, Literal

import typer

from specdec_cli import options as given

PLAIN_HELP = {"help_option_names": ["-h", "--help"]}
HYDRA = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}  # hydra prints its own help

WRITE, MEASURE, PREPARE = "Text", "Measurements and checks", "Models"

app = typer.Typer(
    name="specdec",
    help="Lossless speculative decoding for Hugging Face models.",
    epilog="Any command takes --debug: where something unexpected happens, it shows the traceback.",
    no_args_is_help=True,
    context_settings=PLAIN_HELP,
)
audits = typer.Typer(no_args_is_help=True, context_settings=PLAIN_HELP, help="Check a claim on a model of your own.")
app.add_typer(audits, name="audit", rich_help_panel=MEASURE)


@app.callback(invoke_without_command=True)
def start(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> int:
    """Lossless speculative decoding for Hugging Face models."""
    if show_version:
        typer.echo(f"specdec {_version()}")
        raise typer.Exit
    return 0


@app.command(
    rich_help_panel=WRITE, epilog='Example: specdec generate MODEL "Explain caches." --drafter DRAFT --temperature 0.7'
)
def generate(
    model: given.ModelArgument,
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="The prompt; without it, --file or standard input.", show_default=False),
    ] = None,
    file: Annotated[
        str | None, typer.Option("--file", metavar="FILE", rich_help_panel=given.PROMPT, help="Read the prompt there.")
    ] = None,
    system: given.System = None,
    raw: Annotated[
        bool,
        typer.Option("--raw", rich_help_panel=given.PROMPT, help="No chat template: complete the prompt as it is."),
    ] = False,
    drafter: given.Drafter = "prompt_lookup",
    num_draft_tokens: given.NumDraftTokens = given.AUTO,
    show_drafts: Annotated[
        bool,
        typer.Option(
            "--show-drafts", rich_help_panel=given.OUTPUT, help="Mark which tokens the drafter proposed, as they come."
        ),
    ] = False,
    max_new_tokens: given.MaxNewTokens = 256,
    temperature: given.Temperature = 0.0,
    top_p: given.TopP = None,
    top_k: given.TopK = None,
    min_p: given.MinP = None,
    stop: given.Stop = None,
    seed: given.Seed = 0,
    dtype: given.Dtype = None,
    device: given.Device = "cpu",
    quantize: given.Quantize = None,
    compile: given.Compile = False,
    json: given.Json = False,
) -> int:
    """Write one text, as it comes; the figures go to standard error."""
    return _run("generate", locals())


@app.command(rich_help_panel=WRITE, epilog="Example: specdec chat MODEL --drafter DRAFT --system 'Answer briefly.'")
def chat(
    model: given.ModelArgument,
    system: given.System = None,
    drafter: given.Drafter = "prompt_lookup",
    num_draft_tokens: given.NumDraftTokens = given.AUTO,
    show_drafts: Annotated[
        bool,
        typer.Option("--show-drafts", rich_help_panel=given.OUTPUT, help="Mark which tokens the drafter proposed."),
    ] = False,
    max_new_tokens: given.MaxNewTokens = 512,
    temperature: given.Temperature = 0.0,
    top_p: given.TopP = None,
    top_k: given.TopK = None,
    min_p: given.MinP = None,
    seed: given.Seed = 0,
    dtype: given.Dtype = None,
    device: given.Device = "cpu",
    quantize: given.Quantize = None,
    compile: given.Compile = False,
) -> int:
    """Talk to a model. /help lists what can be typed besides messages."""
    return _run("chat", locals())


@app.command(
    rich_help_panel=MEASURE,
    epilog="Example: specdec bench MODEL --drafter DRAFT --batch 1,8 --num-draft-tokens 2,4,auto --prompts FILE",
)
def bench(
    model: given.ModelArgument,
    drafter: given.Drafter = "prompt_lookup",
    num_draft_tokens: Annotated[
        Any,
        typer.Option(
            "--num-draft-tokens",
            rich_help_panel=given.SPECULATION,
            metavar="K,K,…",
            parser=given.several(given.num_draft_tokens),
            help="Draft tokens of a step, of each setting to compare.",
        ),
    ] = "2,4,auto",
    batch: Annotated[
        Any,
        typer.Option(
            "--batch", rich_help_panel=given.MEASURE, metavar="B,B,…", parser=given.several(int), help="Rows of a call."
        ),
    ] = "1",
    rounds: Annotated[
        int,
        typer.Option(
            "--rounds", rich_help_panel=given.MEASURE, min=1, metavar="N", help="Interleaved rounds behind a warm-up."
        ),
    ] = 3,
    prompts: given.Prompts = None,
    max_prompts: Annotated[
        int,
        typer.Option("--max-prompts", rich_help_panel=given.PROMPT, min=1, metavar="N", help="Use the first so many."),
    ] = 8,
    max_new_tokens: given.MaxNewTokens = 64,
    temperature: given.Temperature = 0.0,
    seed: given.Seed = 0,
    dtype: given.Dtype = None,
    device: given.Device = "cpu",
    quantize: given.Quantize = None,
    compile: given.Compile = False,
    json: given.Json = False,
) -> int:
    """Is it faster? transformers' loops, plain decoding and speculation, in interleaved rounds."""
    return _run("bench", locals())


@app.command(rich_help_panel=WRITE, epilog="Example: specdec demo --drafter eagle3 --num-draft-tokens 3")
def demo(
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", rich_help_panel=given.PROMPT, metavar="TEXT", help="Default: an excerpt of Python."),
    ] = None,
    drafter: Annotated[
        str | None,
        typer.Option(
            "--drafter",
            rich_help_panel=given.SPECULATION,
            metavar="DRAFTER",
            help=f"{given.DRAFTER_HELP} Or eagle3, the embedded target's head. Default: the embedded draft model.",
        ),
    ] = None,
    num_draft_tokens: given.NumDraftTokens = given.AUTO,
    max_new_tokens: given.MaxNewTokens = 96,
    temperature: given.Temperature = 0.0,
    seed: given.Seed = 0,
    dtype: given.Dtype = None,
    device: given.Device = "cpu",
    compile: given.Compile = False,
    json: given.Json = False,
) -> int:
    """See speculation at work on a small pair of models that is part of the package."""
    return _run("demo", locals())


@app.command(rich_help_panel=PREPARE, epilog="Example: specdec env --json")
def env(json: given.Json = False) -> int:
    """Versions, devices, kernels, and what is missing; for bug reports."""
    return _run("env", locals())


@app.command(rich_help_panel=PREPARE, epilog="Example: specdec quantize MODEL FOLDER --group-size 64")
def quantize(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="A folder or a hub id.", show_default=False)],
    destination: Annotated[
        str, typer.Argument(metavar="FOLDER", help="Empty, or does not exist yet.", show_default=False)
    ],
    group_size: given.GroupSize = 128,
    asymmetric: given.Asymmetric = False,
    skip: given.Skip = None,
    head: given.Head = "int8",
    activations: given.Activations = "int8",
) -> int:
    """Write a model in 4 bits."""
    skip = skip or []
    return _run("quantize", locals())


@app.command(rich_help_panel=PREPARE, epilog="Example: specdec plan --target MODEL --drafter DRAFT --card 24GiB")
def plan(
    target: Annotated[
        str, typer.Option("--target", metavar="MODEL", help="A folder or a hub id; only its config is read.")
    ],
    drafter: Annotated[
        str | None,
        typer.Option(
            "--drafter",
            metavar="DRAFTER",
            help="A draft model or draft head, likewise, mtp (the target's own layer), suffix, or"
            " suffix+FOLDER_OR_HUB_ID; without it, drafting takes no memory.",
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            "--context", metavar="N", help="Tokens of a row at the end of a call, its prompt included. Default: 4096."
        ),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", metavar="B", help="Rows of a batch.")] = 1,
    num_draft_tokens: Annotated[
        int | None,
        typer.Option(
            "--num-draft-tokens", metavar="K", help="Draft tokens of a step. Default: the most that auto proposes."
        ),
    ] = None,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"], typer.Option("--dtype", help="Of what is not in 4 bits.")
    ] = "bfloat16",
    group_size: Annotated[
        int, typer.Option("--group-size", metavar="N", help="Columns that share a scale: 16 to 256, or -1, a row.")
    ] = 128,
    card: Annotated[
        list[str] | None,
        typer.Option("--card", metavar="NAME_OR_SIZE", help="A GPU's name, or its memory as in 24GiB; repeatable."),
    ] = None,
    plot: Annotated[
        str | None, typer.Option("--plot", metavar="FILE", help="Draw memory there: .svg, .png or .pdf.")
    ] = None,
    json: given.Json = False,
) -> int:
    """Memory of two models and their caches, from their configs alone."""
    return _run("plan", locals())


@app.command(
    rich_help_panel=MEASURE,
    context_settings=HYDRA,
    add_help_option=False,
    epilog="Example: specdec experiment experiment=demo num_draft_tokens=4",
)
def experiment(context: typer.Context) -> int:
    """Run a hydra config: records, figures, one page (--help lists groups)."""
    return int(import_module("specdec_cli.hydra_app").main(context.args, "config"))


@app.command(
    "train-drafter", rich_help_panel=PREPARE, context_settings=HYDRA, add_help_option=False,
    epilog="Example: specdec train-drafter target.path=MODEL workload.path=FILE folder=FOLDER",
)  # fmt: skip
def train_drafter(context: typer.Context) -> int:
    """Train a draft head or draft model on what a target answers (--help lists settings)."""
    return int(import_module("specdec_cli.hydra_app").main(context.args, "train"))


@app.command(
    rich_help_panel=MEASURE,
    epilog="Example: specdec report runs/A runs/B --markdown --fail-if 'mean_acceptance_length<-5%'",
)
def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="A run's folder, or a sweep's; several are compared with the first one. Also results files of vLLM,"
            " SGLang and Spec-Bench.",
            show_default=False,
        ),
    ],
    output: Annotated[
        str | None,
        typer.Option(
            "-o", "--output", metavar="FILE", help="Default: report.html in the first run's folder; else stdout."
        ),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Tables for a pull request or a job's summary.")] = False,
    json: Annotated[bool, typer.Option("--json", help="All figures as one JSON object.")] = False,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-if",
            metavar="EXPR",
            help="Exit with 1 where this holds. Of one run, its figure: 'speedup<1.0', or the end of its interval:"
            " 'speedup.low<1.0'. Of several, the change from the first: 'mean_acceptance_length<-5%' is relative,"
            f" 'draft_acceptance_rate<-0.02' absolute (two points). Repeatable. Metrics: {', '.join(given.METRICS)}.",
        ),
    ] = None,
) -> int:
    """A page from the records of one run or several; compare them, gate on them."""
    if markdown and json:
        raise typer.BadParameter("--markdown and --json exclude each other; give one")
    fail_if = fail_if or []
    return _run("report", locals())


MaxPrompts = Annotated[
    int, typer.Option("--max-prompts", rich_help_panel=given.PROMPT, metavar="N", help="Use the first so many.")
]


@audits.command(epilog="Example: specdec audit lossless MODEL --drafter DRAFT --budget 10min --output FOLDER")
def lossless(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=given.MODEL_HELP, show_default=False)] = None,
    reference: Annotated[
        str | None, typer.Option("--reference", metavar="URL", help="Instead of MODEL: a server without speculation.")
    ] = None,
    candidate: Annotated[
        str | None, typer.Option("--candidate", metavar="URL", help="A server of the same model with speculation.")
    ] = None,
    server_model: Annotated[
        str | None,
        typer.Option("--server-model", metavar="NAME", help="As requests name it; default: the first one listed."),
    ] = None,
    load: Annotated[
        int, typer.Option("--load", metavar="N", help="Requests to a server at a time, besides single ones.")
    ] = 8,
    drafter: Annotated[
        list[str] | None,
        typer.Option(
            "--drafter",
            rich_help_panel=given.SPECULATION,
            metavar="DRAFTER",
            help=f"{given.DRAFTER_HELP} Repeatable. Default: prompt_lookup, suffix, and the draft model of the embedded"
            " target.",
        ),
    ] = None,
    budget: Annotated[
        Any,
        typer.Option(
            "--budget",
            metavar="TIME",
            parser=given.seconds,
            help="How long this run may take: 90s, 10min, 2h. With --output, a further run goes on where it ended.",
        ),
    ] = "2min",
    prompts: given.Prompts = None,
    max_prompts: MaxPrompts = 100,
    first_prompt: Annotated[
        int, typer.Option("--first-prompt", rich_help_panel=given.PROMPT, metavar="N", help="Skip the first N.")
    ] = 0,
    num_draft_tokens: Annotated[
        Any,
        typer.Option(
            "--num-draft-tokens",
            rich_help_panel=given.SPECULATION,
            metavar="K,K,…",
            parser=given.several(given.num_draft_tokens),
            help="Of greedy texts.",
        ),
    ] = "1,3,6,auto",
    batch: Annotated[
        Any, typer.Option("--batch", metavar="B,B,…", parser=given.several(int), help="Rows of greedy calls.")
    ] = "1,4",
    prefill_chunk: Annotated[
        Any,
        typer.Option(
            "--prefill-chunk",
            metavar="P,P,…",
            parser=given.several(given.prefill_chunk),
            help="Positions of a prompt that greedy calls read at a time.",
        ),
    ] = "whole,16",
    loop: Annotated[
        Literal["specdec", "transformers"],
        typer.Option(
            "--loop",
            help="Whose loop is audited; transformers' assisted decoding takes --batch 1, --prefill-chunk whole and"
            " numbers of draft tokens.",
        ),
    ] = "specdec",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", metavar="N", help="Of greedy texts.")] = 64,
    max_draws: Annotated[
        int, typer.Option("--max-draws", metavar="N", help="Sampled ids after which sampling ends.")
    ] = 20_000,
    alpha: Annotated[
        float, typer.Option("--alpha", metavar="P", help="Rate of false alarms of the sampling test.")
    ] = 0.001,
    seed: given.Seed = 0,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", metavar="FOLDER", help="Keep what is found there, with certificate.json and certificate.html."
        ),
    ] = None,
    dtype: given.Dtype = None,
    device: given.Device = "cpu",
    json: given.Json = False,
) -> int:
    """A certificate: does speculation change the answers of a model?"""
    return _run("audit_lossless", locals())


@audits.command(epilog="Example: specdec audit head MODEL HEAD")
def head(
    model: given.ModelArgument,
    head: Annotated[
        str,
        typer.Argument(
            metavar="HEAD", help="The draft head: a folder or a hub id; mtp, the target's own.", show_default=False
        ),
    ],
    prompts: given.Prompts = None,
    max_prompts: MaxPrompts = 32,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", metavar="N", help="Of each text.")] = 128,
    seed: given.Seed = 0,
    dtype: given.Dtype = None,
    device: given.Device = "cpu",
    json: given.Json = False,
) -> int:
    """Is a draft head run as it was trained? Tries its settings, one by one."""
    return _run("audit_head", locals())


@audits.command(epilog="Example: specdec audit quality INT4_MODEL --original MODEL --text FILE")
def quality(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A 4-bit model, with --original; or a plain one, quantized here.", show_default=False
        ),
    ],
    text: Annotated[str, typer.Option("--text", metavar="FILE", help="A plain text, like what the model will write.")],
    original: Annotated[
        str | None, typer.Option("--original", metavar="MODEL", help="The model that MODEL was quantized from.")
    ] = None,
    context: Annotated[int, typer.Option("--context", metavar="N", help="Tokens that are read at a time.")] = 512,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", metavar="N", help="Read no more than these; default: the whole text.")
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option("--max-kl", metavar="NATS", help="Exit with 1 where the mean KL divergence is above this."),
    ] = None,
    group_size: given.GroupSize = 128,
    asymmetric: given.Asymmetric = False,
    skip: given.Skip = None,
    head: given.Head = "int8",
    activations: given.Activations = "int8",
    dtype: given.Dtype = None,
    device: given.Device = "cpu",
    json: given.Json = False,
) -> int:
    """Perplexity, KL and top-1 agreement of a 4-bit model against its original."""
    skip = skip or []
    return _run("audit_quality", locals())


def _run(module: str, values: dict[str, Any]) -> int:
    """Run a command's module on its arguments, which are checked before it loads anything: -> the exit code."""
    if values.get("device", "cpu") != "cpu":
        import_module("specdec_cli.setup").check_device(values["device"])
    code: int = _module(module).run(given.Options(**values))
    return code


def _module(name: str) -> Any:
    """A module of specdec_cli, with transformers' own progress bars and warnings off."""
    logging: Any = import_module("transformers.utils.logging")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return import_module(f"specdec_cli.{name}")


def _version() -> str:
    try:
        return version("specdec-lossless")
    except PackageNotFoundError:  # a checkout on PYTHONPATH
        from specdec import __version__

        return __version__
