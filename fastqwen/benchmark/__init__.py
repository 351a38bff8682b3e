"""``fastqwen bench``: what the engine reaches, beside what the machine's memory and arithmetic allow."""
