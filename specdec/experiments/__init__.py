"""From a config to records to a page: workloads, runs, records, figures, reports, memory plans' proof."""
