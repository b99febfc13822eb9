"""Long work over rows, in shards: by any number of processes, killed at any moment, to the same bytes.

The rows of a job are cut into shards of whole batches, by their size alone. What is made of a shard's rows is kept in a
file under a key of those rows, their images, their place and the job's settings (`files`); the shards that are missing
are shared out among the processes (`processes`, `engine`), and when all are there the first process puts the folder's
files together (`assembly`). So the files hold what one process would have written without a stop, and a kill costs each
process the shard that it was at. docs/data.md tells users of it.
"""

from aspo.shards.assembly import SHARDS_FOLDER, check_older
from aspo.shards.engine import ARGUMENTS, Engine, add_arguments
from aspo.shards.job import Job, Make, run_job
from aspo.shards.processes import Processes

__all__ = [
    "ARGUMENTS",
    "SHARDS_FOLDER",
    "Engine",
    "Job",
    "Make",
    "Processes",
    "add_arguments",
    "check_older",
    "run_job",
]
