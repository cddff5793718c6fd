"""The flow served as a deployment, as a process of its own: only a run of a deployment can wait for a person."""

from flows.promote import promote

if __name__ == "__main__":
    promote.serve("served")
