"""The pages and charts of runs, made from the files in their folders."""
