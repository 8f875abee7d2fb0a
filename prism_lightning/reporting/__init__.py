"""Reports: collect finished runs into the paper's tables and figures."""
