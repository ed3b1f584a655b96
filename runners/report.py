"""Writes one self-contained HTML page about one or several runs, finished or not.

python runners/report.py RUN… [--output report.html]
"""

from instance_ssl.report.command import main

if __name__ == "__main__":
    raise SystemExit(main())
