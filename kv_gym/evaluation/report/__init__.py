"""Reports of results: a table in Markdown, pictures, and one page that needs no network."""

from kv_gym.evaluation.report.charts import picture
from kv_gym.evaluation.report.document import COLUMNS, markdown, merged, report, table
from kv_gym.evaluation.report.results import Results, read_results

__all__ = ["COLUMNS", "Results", "markdown", "merged", "picture", "read_results", "report", "table"]
