"""From the command line to the page."""

from collections.abc import Sequence
from pathlib import Path

from instance_ssl.errors import UserError
from instance_ssl.files.atomic import write_text
from instance_ssl.files.disk_space import why_not_written
from instance_ssl.report.runs import open_runs
from instance_ssl.run.console import ArgumentParser, exit_code_of, printable, tell


def main(words: Sequence[str] | None = None) -> int:
    """Writes the page and returns the process's exit code; `words` are the command line's, or None for its own."""
    parser = ArgumentParser(description="One self-contained HTML page about runs, finished or not.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories")
    parser.add_argument("--output", type=Path, help="the page (default: report.html in the first run directory)")

    def write() -> None:
        arguments = parser.parse_args(words)
        runs, output = open_runs(arguments.runs), arguments.output or arguments.runs[0] / "report.html"
        from instance_ssl.report.page import build_page  # late, for it imports torch

        page = printable(build_page(runs), "utf-8")
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            write_text(output, page)
        except OSError as error:
            raise UserError(f"--output {output}: {why_not_written(error, output.parent, len(page))}") from None
        tell(f"{output}: {len(page.encode()) / 2**20:.1f} MiB, {len(runs)} run(s)")

    return exit_code_of(write)
