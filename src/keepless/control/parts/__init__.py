"""Plans of models that do not capture as a whole: by captured blocks, and by module calls."""
